package ai.pollard.client;

import ai.pollard.preprocess.v1.Image;
import ai.pollard.preprocess.v1.ModelSelector;
import ai.pollard.vision.v1.PredictRequest;
import ai.pollard.vision.v1.VisionServiceGrpc;
import com.google.protobuf.ByteString;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;

/** Asks a preprocess server about images. */
public final class VisionClient extends Client {
  private static final String PREDICT = "pollard.vision.v1.VisionService/Predict";

  private final VisionServiceGrpc.VisionServiceBlockingStub stub;

  /** A client of "HOST:PORT" as it is by default. It connects with the first call. */
  public VisionClient(String address) {
    this(address, new ClientOptions());
  }

  /** A client of "HOST:PORT". It connects with the first call. */
  public VisionClient(String address, ClientOptions options) {
    super(address, options);
    stub = VisionServiceGrpc.newBlockingStub(channel);
  }

  /** Answers for an image file by the alias "production". */
  public Prediction predict(Path image, String model) throws IOException {
    return predict(image, model, new PredictOptions());
  }

  /**
   * Answers for an image file.
   *
   * @throws IOException if the file cannot be read
   * @throws PollardException as {@link #predict(byte[], String, PredictOptions)}
   */
  public Prediction predict(Path image, String model, PredictOptions options) throws IOException {
    return predict(Files.readAllBytes(image), model, options);
  }

  /**
   * Answers for the bytes of an image file.
   *
   * @throws PollardException.InvalidArgument if they are damaged, empty, too large or no image
   * @throws PollardException.NotFound if there is no such model, revision or alias
   */
  public Prediction predict(byte[] image, String model, PredictOptions options) {
    Selection selection = options.selection();
    ModelSelector.Builder selector =
        ModelSelector.newBuilder()
            .setModel(Selection.checkedModel(model))
            .setStickyKey(selection.stickyKey());
    if (selection.revision() != 0) {
      selector.setRevision(selection.revision());
    } else if (!selection.alias().isEmpty()) {
      selector.setAlias(selection.alias());
    }
    PredictRequest.Builder request =
        PredictRequest.newBuilder()
            .setModel(selector)
            .setImage(Image.newBuilder().setContent(ByteString.copyFrom(image)));
    request.getOptionsBuilder().setTopK(options.topK()).setEmbedding(options.embedding());
    return call(
        PREDICT,
        () -> Prediction.of(bounded(stub, options.timeout()).predict(request.build())));
  }
}
