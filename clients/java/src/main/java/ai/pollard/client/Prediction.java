package ai.pollard.client;

import ai.pollard.vision.v1.PredictResponse;
import java.util.List;

/**
 * The answer for one image.
 *
 * @param model the model
 * @param revision the revision that answered
 * @param labels best first; empty for models that do not classify
 * @param embedding where it was asked for or is all that the model gives; else empty
 * @param response the whole answer, for detections and masks
 */
public record Prediction(
    String model, long revision, List<Label> labels, List<Float> embedding, PredictResponse response) {

  /**
   * One class and how likely it is.
   *
   * @param index index of the class
   * @param label its name; empty when the bundle names no classes
   * @param score 0 to 1 where the bundle says so
   */
  public record Label(int index, String label, float score) {}

  static Prediction of(PredictResponse response) {
    List<Label> labels =
        response.getClassification().getLabelsList().stream()
            .map(label -> new Label(label.getIndex(), label.getLabel(), label.getScore()))
            .toList();
    List<Float> embedding =
        response.hasClassification()
            ? response.getClassification().getEmbedding().getValuesList()
            : response.getEmbedding().getValuesList();
    return new Prediction(response.getModel(), response.getRevision(), labels, embedding, response);
  }
}
