package ai.pollard.examples;

import ai.pollard.client.PollardException;
import ai.pollard.client.PredictOptions;
import ai.pollard.client.Prediction;
import ai.pollard.client.VisionClient;
import java.io.IOException;
import java.nio.file.Path;
import java.util.Locale;
import java.util.stream.Collectors;

/** Asks a served model about images: Classify MODEL IMAGE… */
public final class Classify {
  private Classify() {}

  /** Runs the program. */
  public static void main(String[] arguments) throws IOException {
    if (arguments.length < 2) {
      System.err.println("usage: Classify MODEL IMAGE…");
      System.exit(2);
    }
    String address = System.getenv().getOrDefault("POLLARD_VISION_ADDRESS", "127.0.0.1:8011");
    try (VisionClient vision = new VisionClient(address)) {
      for (int index = 1; index < arguments.length; index++) {
        Prediction prediction =
            vision.predict(
                Path.of(arguments[index]), arguments[0], new PredictOptions().withTopK(3));
        String best =
            prediction.labels().stream()
                .map(label -> String.format(Locale.ROOT, "%s %.1f%%", label.label(), 100 * label.score()))
                .collect(Collectors.joining(", "));
        System.out.printf("%s: %s (revision %d)%n", arguments[index], best, prediction.revision());
      }
    } catch (PollardException.NotFound error) {
      System.err.println("push a model first: " + error.getMessage());
      System.exit(1);
    } catch (PollardException error) {
      System.err.println(error.getMessage());
      System.exit(1);
    }
  }
}
