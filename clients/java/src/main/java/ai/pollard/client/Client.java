package ai.pollard.client;

import io.grpc.CallCredentials;
import io.grpc.ChannelCredentials;
import io.grpc.CompositeChannelCredentials;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import io.grpc.ManagedChannelBuilder;
import io.grpc.Metadata;
import io.grpc.StatusRuntimeException;
import io.grpc.TlsChannelCredentials;
import io.grpc.stub.AbstractBlockingStub;
import java.io.IOException;
import java.io.UncheckedIOException;
import java.time.Duration;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.concurrent.Executor;
import java.util.concurrent.TimeUnit;
import java.util.function.Supplier;

/**
 * What all clients share: one channel to one server, or to several. A client may be used by many threads at once.
 *
 * <p>A call ends early when its {@link io.grpc.Context} is cancelled or its thread is interrupted.
 */
public abstract class Client implements AutoCloseable {
  // Methods without side effects.
  private static final Map<String, List<String>> RETRIED =
      Map.of(
          "inference.GRPCInferenceService", List.of("ServerReady", "ModelInfer"),
          "pollard.vision.v1.VisionService", List.of("Predict"),
          "pollard.models.v1.ModelService", List.of("ListModels"));

  final String address;
  final ManagedChannel channel;
  private final ClientOptions options;

  Client(String address, ClientOptions options) {
    this.address = address;
    this.options = options;
    ManagedChannelBuilder<?> builder =
        Grpc.newChannelBuilder(ServerList.target(address, options.encrypted()), credentials(options))
            .maxInboundMessageSize(options.maxMessageBytes())
            // A machine that goes without a word is noticed while a call waits for it.
            .keepAliveTime(10, TimeUnit.SECONDS)
            .keepAliveTimeout(5, TimeUnit.SECONDS)
            // A proxy from the environment must not come between a client and its services.
            .proxyDetector(target -> null);
    boolean spread = ServerList.isSeveral(address);
    if (spread || options.maxAttempts() > 1) {
      builder.defaultServiceConfig(serviceConfig(options.maxAttempts(), spread));
    }
    if (options.maxAttempts() > 1) {
      builder.enableRetry();
    } else {
      builder.disableRetry();
    }
    channel = builder.build();
  }

  /** Closes the channel; calls in flight are cancelled. */
  @Override
  public void close() {
    channel.shutdownNow();
    try {
      channel.awaitTermination(10, TimeUnit.SECONDS);
    } catch (InterruptedException interrupted) {
      Thread.currentThread().interrupt();
    }
  }

  /** A stub with the deadline of one call. */
  <S extends AbstractBlockingStub<S>> S bounded(S stub, Duration timeout) {
    Duration chosen = timeout == null ? options.timeout() : timeout;
    return stub.withDeadlineAfter(chosen.toNanos(), TimeUnit.NANOSECONDS)
        .withMaxOutboundMessageSize(options.maxMessageBytes());
  }

  /** Makes a call. */
  <T> T call(String method, Supplier<T> made) {
    try {
      return made.get();
    } catch (StatusRuntimeException failed) {
      throw PollardException.of(failed, method, address);
    }
  }

  private static ChannelCredentials credentials(ClientOptions options) {
    if (!options.encrypted()) {
      return InsecureChannelCredentials.create();
    }
    TlsChannelCredentials.Builder tls = TlsChannelCredentials.newBuilder();
    if (options.authorities().isPresent()) {
      try {
        tls.trustManager(options.authorities().get().toFile());
      } catch (IOException unreadable) {
        throw new UncheckedIOException(unreadable);
      }
    }
    ChannelCredentials made = tls.build();
    return options.token().isEmpty()
        ? made
        : CompositeChannelCredentials.create(made, new Bearer(options.token().get()));
  }

  // With `spread`, requests go in turn to the servers that are there and, where gRPC's services are on the
  // class path, say that they are well.
  private static Map<String, Object> serviceConfig(int maxAttempts, boolean spread) {
    Map<String, Object> config = new HashMap<>();
    if (spread) {
      config.put("loadBalancingConfig", List.of(Map.of("round_robin", Map.of())));
      config.put("healthCheckConfig", Map.of("serviceName", ""));
    }
    if (maxAttempts > 1) {
      config.put("methodConfig", List.of(retries(maxAttempts)));
    }
    return config;
  }

  private static Map<String, Object> retries(int maxAttempts) {
    List<Map<String, Object>> names = new ArrayList<>();
    RETRIED.forEach(
        (service, methods) ->
            methods.forEach(method -> names.add(Map.of("service", service, "method", method))));
    Map<String, Object> retryPolicy =
        Map.of(
            "maxAttempts", (double) maxAttempts,
            "initialBackoff", "0.1s",
            "maxBackoff", "2s",
            "backoffMultiplier", 2.0,
            // gRPC's servers cancel what reaches them while they stop, before it has begun.
            "retryableStatusCodes", List.of("UNAVAILABLE", "CANCELLED"));
    return Map.of("name", names, "retryPolicy", retryPolicy);
  }

  /** A token as gRPC's credentials. */
  private static final class Bearer extends CallCredentials {
    private static final Metadata.Key<String> KEY =
        Metadata.Key.of("authorization", Metadata.ASCII_STRING_MARSHALLER);

    private final String value;

    Bearer(String token) {
      value = "Bearer " + token;
    }

    @Override
    public void applyRequestMetadata(RequestInfo call, Executor executor, MetadataApplier applier) {
      Metadata headers = new Metadata();
      headers.put(KEY, value);
      applier.apply(headers);
    }

    // No @Override: newer versions of gRPC have removed it.
    public void thisUsesUnstableApi() {}
  }
}
