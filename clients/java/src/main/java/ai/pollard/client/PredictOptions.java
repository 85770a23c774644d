package ai.pollard.client;

import java.time.Duration;
import java.util.Objects;

/**
 * What an answer for an image shall be.
 *
 * @param selection which revision is asked
 * @param topK number of labels; 0 for what the bundle says
 * @param embedding whether to give the embedding too, where the bundle has one
 * @param timeout deadline; null for the client's
 */
public record PredictOptions(Selection selection, int topK, boolean embedding, Duration timeout) {
  /** The alias "production", and what the bundle says. */
  public PredictOptions() {
    this(Selection.PRODUCTION, 0, false, null);
  }

  /** Checks the values. */
  public PredictOptions {
    Objects.requireNonNull(selection);
    if (topK < 0) {
      throw new IllegalArgumentException("topK must be 0 or more, not " + topK);
    }
  }

  /** Of another revision. */
  public PredictOptions withSelection(Selection value) {
    return new PredictOptions(value, topK, embedding, timeout);
  }

  /** With so many labels. */
  public PredictOptions withTopK(int value) {
    return new PredictOptions(selection, value, embedding, timeout);
  }

  /** With the embedding. */
  public PredictOptions withEmbedding() {
    return new PredictOptions(selection, topK, true, timeout);
  }

  /** With another deadline. */
  public PredictOptions withTimeout(Duration value) {
    return new PredictOptions(selection, topK, embedding, value);
  }
}
