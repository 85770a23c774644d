package ai.pollard.client;

import inference.GRPCInferenceServiceGrpc;
import inference.GrpcService.ModelInferRequest;
import inference.GrpcService.ModelInferResponse;
import inference.GrpcService.ServerReadyRequest;
import io.grpc.Metadata;
import io.grpc.stub.MetadataUtils;
import java.util.ArrayList;
import java.util.List;

/** Asks an inference server, by the Open Inference Protocol. */
public final class InferenceClient extends Client {
  private static final String SERVICE = "inference.GRPCInferenceService/";
  private static final Metadata.Key<String> ALIAS =
      Metadata.Key.of("pollard-alias", Metadata.ASCII_STRING_MARSHALLER);
  private static final Metadata.Key<String> STICKY_KEY =
      Metadata.Key.of("pollard-sticky-key", Metadata.ASCII_STRING_MARSHALLER);

  private final GRPCInferenceServiceGrpc.GRPCInferenceServiceBlockingStub stub;

  /** A client of "HOST:PORT" as it is by default. It connects with the first call. */
  public InferenceClient(String address) {
    this(address, new ClientOptions());
  }

  /** A client of "HOST:PORT". It connects with the first call. */
  public InferenceClient(String address, ClientOptions options) {
    super(address, options);
    stub = GRPCInferenceServiceGrpc.newBlockingStub(channel);
  }

  /** Runs a model once by the alias "production". */
  public InferResult infer(String model, List<Tensor> inputs) {
    return infer(model, inputs, new InferOptions());
  }

  /**
   * Runs a model once. The first dimension of each input is the batch.
   *
   * @throws PollardException.InvalidArgument if an input does not fit the model
   * @throws PollardException.NotFound if there is no such model, revision or alias
   */
  public InferResult infer(String model, List<Tensor> inputs, InferOptions options) {
    Selection selection = options.selection();
    ModelInferRequest.Builder request =
        ModelInferRequest.newBuilder().setModelName(Selection.checkedModel(model)).setId(options.id());
    if (selection.revision() != 0) {
      request.setModelVersion(Long.toString(selection.revision()));
    }
    for (Tensor input : inputs) {
      request
          .addInputsBuilder()
          .setName(input.name())
          .setDatatype(input.datatype())
          .addAllShape(input.shape());
      request.addRawInputContents(input.raw());
    }
    options.outputs().forEach(name -> request.addOutputsBuilder().setName(name));
    Metadata headers = new Metadata();
    if (!selection.alias().isEmpty()) {
      headers.put(ALIAS, selection.alias());
    }
    if (!selection.stickyKey().isEmpty()) {
      headers.put(STICKY_KEY, selection.stickyKey());
    }
    ModelInferResponse response =
        call(
            SERVICE + "ModelInfer",
            () ->
                bounded(stub, options.timeout())
                    .withInterceptors(MetadataUtils.newAttachHeadersInterceptor(headers))
                    .modelInfer(request.build()));
    if (response.getRawOutputContentsCount() != response.getOutputsCount()) {
      throw new IllegalStateException("the server answered with outputs that are not raw");
    }
    List<Tensor> outputs = new ArrayList<>();
    for (int index = 0; index < response.getOutputsCount(); index++) {
      ModelInferResponse.InferOutputTensor output = response.getOutputs(index);
      outputs.add(
          new Tensor(
              output.getName(),
              output.getDatatype(),
              List.copyOf(output.getShapeList()),
              response.getRawOutputContents(index)));
    }
    return new InferResult(
        response.getModelName(),
        Long.parseLong(response.getModelVersion()),
        response.getId(),
        List.copyOf(outputs));
  }

  /** Says whether the server takes inference requests. */
  public boolean ready() {
    return call(
        SERVICE + "ServerReady",
        () ->
            bounded(stub, null).serverReady(ServerReadyRequest.getDefaultInstance()).getReady());
  }
}
