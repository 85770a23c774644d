package ai.pollard.client;

import ai.pollard.models.v1.Alias;
import ai.pollard.models.v1.ListModelsRequest;
import ai.pollard.models.v1.ListModelsResponse;
import ai.pollard.models.v1.ModelServiceGrpc;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.stream.Collectors;

/** Asks the model management server. */
public final class ModelsClient extends Client {
  private static final int PAGE = 200;

  private final ModelServiceGrpc.ModelServiceBlockingStub stub;

  /**
   * A model of the registry.
   *
   * @param name its name
   * @param description free text
   * @param labels labels
   * @param latestRevision number of the newest revision; 0 when there is none
   * @param aliases revisions by alias
   */
  public record Model(
      String name,
      String description,
      Map<String, String> labels,
      long latestRevision,
      Map<String, Long> aliases) {}

  /** A client of "HOST:PORT" as it is by default. It connects with the first call. */
  public ModelsClient(String address) {
    this(address, new ClientOptions());
  }

  /** A client of "HOST:PORT". It connects with the first call. */
  public ModelsClient(String address, ClientOptions options) {
    super(address, options);
    stub = ModelServiceGrpc.newBlockingStub(channel);
  }

  /** All models, by name. */
  public List<Model> list() {
    List<Model> models = new ArrayList<>();
    ListModelsRequest.Builder request = ListModelsRequest.newBuilder().setPageSize(PAGE);
    do {
      ListModelsResponse page =
          call(
              "pollard.models.v1.ModelService/ListModels",
              () -> bounded(stub, null).listModels(request.build()));
      page.getModelsList().forEach(message -> models.add(model(message)));
      request.setPageToken(page.getNextPageToken());
    } while (!request.getPageToken().isEmpty());
    return models;
  }

  private static Model model(ai.pollard.models.v1.Model message) {
    return new Model(
        lastPart(message.getName()),
        message.getDescription(),
        Map.copyOf(message.getLabelsMap()),
        message.getLatestRevision(),
        message.getAliasesList().stream()
            .collect(
                Collectors.toUnmodifiableMap(
                    alias -> lastPart(alias.getName()), Alias::getRevision)));
  }

  private static String lastPart(String name) {
    return name.substring(name.lastIndexOf('/') + 1);
  }
}
