package ai.pollard.client;

import com.google.protobuf.Any;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.rpc.ErrorInfo;
import io.grpc.Metadata;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.protobuf.ProtoUtils;
import java.util.Map;

/**
 * A server, or the way to it, answered with a status. The usual statuses have classes of their own, such as {@link
 * NotFound}.
 */
public class PollardException extends RuntimeException {
  private static final long serialVersionUID = 1L;

  private static final Metadata.Key<com.google.rpc.Status> DETAILS =
      Metadata.Key.of(
          "grpc-status-details-bin",
          ProtoUtils.metadataMarshaller(com.google.rpc.Status.getDefaultInstance()));

  /** The call was cancelled, by its context, by an interrupt of its thread or by the server. */
  public static class Cancelled extends PollardException {
    private static final long serialVersionUID = 1L;

    Cancelled(Failure failure) {
      super(failure);
    }
  }

  /** Something in the request is wrong whatever the state of the server. */
  public static class InvalidArgument extends PollardException {
    private static final long serialVersionUID = 1L;

    InvalidArgument(Failure failure) {
      super(failure);
    }
  }

  /** No answer came in time. */
  public static class DeadlineExceeded extends PollardException {
    private static final long serialVersionUID = 1L;

    DeadlineExceeded(Failure failure) {
      super(failure);
    }
  }

  /** A model, revision, alias or other resource does not exist. */
  public static class NotFound extends PollardException {
    private static final long serialVersionUID = 1L;

    NotFound(Failure failure) {
      super(failure);
    }
  }

  /** The caller may not do this. */
  public static class PermissionDenied extends PollardException {
    private static final long serialVersionUID = 1L;

    PermissionDenied(Failure failure) {
      super(failure);
    }
  }

  /** A disk, a quota or a message limit is full. */
  public static class ResourceExhausted extends PollardException {
    private static final long serialVersionUID = 1L;

    ResourceExhausted(Failure failure) {
      super(failure);
    }
  }

  /** The resource is not in a state that allows this. */
  public static class FailedPrecondition extends PollardException {
    private static final long serialVersionUID = 1L;

    FailedPrecondition(Failure failure) {
      super(failure);
    }
  }

  /** The server cannot be reached or does not answer now; trying again may help. */
  public static class Unavailable extends PollardException {
    private static final long serialVersionUID = 1L;

    Unavailable(Failure failure) {
      super(failure);
    }
  }

  /** The caller did not say who it is, or not believably. */
  public static class Unauthenticated extends PollardException {
    private static final long serialVersionUID = 1L;

    Unauthenticated(Failure failure) {
      super(failure);
    }
  }

  /** What is known of a failure. */
  record Failure(StatusRuntimeException cause, ErrorInfo info, String method, String address) {}

  private final Status.Code code;
  private final String reason;
  private final String domain;
  private final Map<String, String> metadata;
  private final String method;
  private final String address;

  PollardException(Failure failure) {
    super(message(failure.cause().getStatus()), failure.cause());
    code = failure.cause().getStatus().getCode();
    reason = failure.info().getReason();
    domain = failure.info().getDomain();
    metadata = Map.copyOf(failure.info().getMetadataMap());
    method = failure.method();
    address = failure.address();
  }

  /** The status. */
  public Status.Code code() {
    return code;
  }

  /** Reason in upper snake case, such as "REVISION_UNKNOWN"; empty when the server gave none. */
  public String reason() {
    return reason;
  }

  /** Who defines the reason: "pollard.ai" for Pollard's services. */
  public String domain() {
    return domain;
  }

  /** The values that the message speaks of. */
  public Map<String, String> metadata() {
    return metadata;
  }

  /** The gRPC method, such as "pollard.vision.v1.VisionService/Predict". */
  public String method() {
    return method;
  }

  /** The server's address. */
  public String address() {
    return address;
  }

  static PollardException of(StatusRuntimeException cause, String method, String address) {
    Failure failure = new Failure(cause, info(cause.getTrailers()), method, address);
    return switch (cause.getStatus().getCode()) {
      case CANCELLED -> new Cancelled(failure);
      case INVALID_ARGUMENT -> new InvalidArgument(failure);
      case DEADLINE_EXCEEDED -> new DeadlineExceeded(failure);
      case NOT_FOUND -> new NotFound(failure);
      case PERMISSION_DENIED -> new PermissionDenied(failure);
      case RESOURCE_EXHAUSTED -> new ResourceExhausted(failure);
      case FAILED_PRECONDITION -> new FailedPrecondition(failure);
      case UNAVAILABLE -> new Unavailable(failure);
      case UNAUTHENTICATED -> new Unauthenticated(failure);
      default -> new PollardException(failure);
    };
  }

  /** What the server said; of a connection that failed, gRPC says only "io exception", and its cause says why. */
  private static String message(Status status) {
    String said = status.getDescription() == null ? status.getCode().toString() : status.getDescription();
    Throwable root = status.getCause();
    while (root != null && root.getCause() != null) {
      root = root.getCause();
    }
    return root == null ? said : said + ": " + root;
  }

  private static ErrorInfo info(Metadata trailers) {
    try {
      com.google.rpc.Status details = trailers == null ? null : trailers.get(DETAILS);
      if (details != null) {
        for (Any detail : details.getDetailsList()) {
          if (detail.is(ErrorInfo.class)) {
            return detail.unpack(ErrorInfo.class);
          }
        }
      }
    } catch (InvalidProtocolBufferException | IllegalArgumentException unreadable) {
      // Details that cannot be read leave the status and the message, which say enough.
    }
    return ErrorInfo.getDefaultInstance();
  }
}
