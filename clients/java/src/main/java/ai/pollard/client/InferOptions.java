package ai.pollard.client;

import java.time.Duration;
import java.util.List;
import java.util.Objects;

/**
 * Which revision runs, and what of it is wanted.
 *
 * @param selection which revision runs
 * @param outputs outputs wanted, by name; empty for all
 * @param id given back in the answer
 * @param timeout deadline; null for the client's
 */
public record InferOptions(Selection selection, List<String> outputs, String id, Duration timeout) {
  /** The alias "production", and all outputs. */
  public InferOptions() {
    this(Selection.PRODUCTION, List.of(), "", null);
  }

  /** Checks the values. */
  public InferOptions {
    Objects.requireNonNull(selection);
    outputs = List.copyOf(outputs);
  }

  /** Of another revision. */
  public InferOptions withSelection(Selection value) {
    return new InferOptions(value, outputs, id, timeout);
  }

  /** Only these outputs. */
  public InferOptions withOutputs(List<String> value) {
    return new InferOptions(selection, value, id, timeout);
  }

  /** With an id, which the answer gives back. */
  public InferOptions withId(String value) {
    return new InferOptions(selection, outputs, value, timeout);
  }

  /** With another deadline. */
  public InferOptions withTimeout(Duration value) {
    return new InferOptions(selection, outputs, id, value);
  }
}
