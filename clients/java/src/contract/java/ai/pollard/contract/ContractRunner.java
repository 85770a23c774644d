package ai.pollard.contract;

import ai.pollard.client.ClientOptions;
import ai.pollard.client.InferOptions;
import ai.pollard.client.InferResult;
import ai.pollard.client.InferenceClient;
import ai.pollard.client.ModelsClient;
import ai.pollard.client.PollardException;
import ai.pollard.client.PredictOptions;
import ai.pollard.client.Prediction;
import ai.pollard.client.Selection;
import ai.pollard.client.Tensor;
import ai.pollard.client.VisionClient;
import com.google.protobuf.ListValue;
import com.google.protobuf.Struct;
import com.google.protobuf.Value;
import com.google.protobuf.util.JsonFormat;
import io.grpc.Context;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Duration;
import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.Executors;
import java.util.concurrent.ScheduledExecutorService;
import java.util.concurrent.TimeUnit;

/** The contract runner: ContractRunner PLAN (see tests/contract/README.md). */
public final class ContractRunner {
  private ContractRunner() {}

  /** Runs the program. */
  public static void main(String[] arguments) throws Exception {
    Struct.Builder plan = Struct.newBuilder();
    JsonFormat.parser().merge(Files.readString(Path.of(arguments[0])), plan);
    JsonFormat.Printer printer = JsonFormat.printer().omittingInsignificantWhitespace();
    ScheduledExecutorService timer = Executors.newSingleThreadScheduledExecutor();
    for (Value value : plan.getFieldsOrThrow("cases").getListValue().getValuesList()) {
      Struct each = value.getStructValue();
      Struct.Builder line = Struct.newBuilder().putFields("case", of(text(each, "case")));
      Context.CancellableContext context = Context.current().withCancellation();
      long delay = (long) (1000 * number(each, "cancel_after_seconds"));
      if (delay > 0) {
        timer.schedule(() -> context.cancel(null), delay, TimeUnit.MILLISECONDS);
      }
      try {
        Struct answer = context.call(() -> run(each));
        line.putFields("answer", Value.newBuilder().setStructValue(answer).build());
      } catch (PollardException error) {
        Struct.Builder metadata = Struct.newBuilder();
        error.metadata().forEach((key, said) -> metadata.putFields(key, of(said)));
        Struct.Builder made =
            Struct.newBuilder()
                .putFields("code", of(error.code().name()))
                .putFields("message", of(error.getMessage()))
                .putFields("reason", of(error.reason()))
                .putFields("domain", of(error.domain()))
                .putFields("metadata", Value.newBuilder().setStructValue(metadata).build());
        line.putFields("error", Value.newBuilder().setStructValue(made).build());
      } catch (IllegalArgumentException refused) {
        Struct message = Struct.newBuilder().putFields("message", of(refused.getMessage())).build();
        line.putFields("refused", Value.newBuilder().setStructValue(message).build());
      } finally {
        context.cancel(null);
      }
      System.out.println(printer.print(line));
    }
    timer.shutdownNow();
  }

  private static Struct run(Struct each) throws IOException {
    Struct arguments = each.getFieldsOrThrow("arguments").getStructValue();
    String address = text(each, "address");
    ClientOptions options = options(each.getFieldsOrThrow("client").getStructValue());
    switch (text(each, "call")) {
      case "predict":
        try (VisionClient client = new VisionClient(address, options)) {
          return predict(client, arguments);
        }
      case "infer":
        try (InferenceClient client = new InferenceClient(address, options)) {
          for (int more = (int) number(each, "requests"); more > 1; more--) {
            infer(client, arguments);
          }
          return infer(client, arguments);
        }
      case "list_models":
        try (ModelsClient client = new ModelsClient(address, options)) {
          ListValue.Builder models = ListValue.newBuilder();
          for (ModelsClient.Model model : client.list()) {
            models.addValues(
                of(
                    Struct.newBuilder()
                        .putFields("name", of(model.name()))
                        .putFields("latest_revision", of(model.latestRevision()))));
          }
          return Struct.newBuilder().putFields("models", of(models)).build();
        }
      default:
        throw new IllegalArgumentException("this runner knows no call " + text(each, "call"));
    }
  }

  private static Struct predict(VisionClient client, Struct arguments) throws IOException {
    PredictOptions options =
        new PredictOptions()
            .withTopK((int) number(arguments, "top_k"))
            .withSelection(selection(arguments, "revision"));
    Prediction prediction =
        client.predict(Path.of(text(arguments, "image_path")), text(arguments, "model"), options);
    ListValue.Builder labels = ListValue.newBuilder();
    for (Prediction.Label label : prediction.labels()) {
      labels.addValues(
          of(
              Struct.newBuilder()
                  .putFields("index", of(label.index()))
                  .putFields("label", of(label.label()))
                  .putFields("score", of(label.score()))));
    }
    return Struct.newBuilder()
        .putFields("model", of(prediction.model()))
        .putFields("revision", of(prediction.revision()))
        .putFields("labels", of(labels))
        .build();
  }

  private static Struct infer(InferenceClient client, Struct arguments) {
    List<Tensor> inputs = new ArrayList<>();
    for (Value value : arguments.getFieldsOrThrow("inputs").getListValue().getValuesList()) {
      inputs.add(tensor(value.getStructValue()));
    }
    InferOptions options =
        new InferOptions()
            .withId(text(arguments, "id"))
            .withSelection(selection(arguments, "version"));
    InferResult result = client.infer(text(arguments, "model"), inputs, options);
    ListValue.Builder outputs = ListValue.newBuilder();
    for (Tensor output : result.outputs()) {
      ListValue.Builder shape = ListValue.newBuilder();
      output.shape().forEach(size -> shape.addValues(of(size)));
      ListValue.Builder data = ListValue.newBuilder();
      for (float number : output.floats()) {
        data.addValues(of(number));
      }
      outputs.addValues(
          of(
              Struct.newBuilder()
                  .putFields("name", of(output.name()))
                  .putFields("datatype", of(output.datatype()))
                  .putFields("shape", of(shape))
                  .putFields("data", of(data))));
    }
    return Struct.newBuilder()
        .putFields("model", of(result.model()))
        .putFields("version", of(result.version()))
        .putFields("id", of(result.id()))
        .putFields("outputs", of(outputs))
        .build();
  }

  private static Tensor tensor(Struct input) {
    List<Long> shape =
        input.getFieldsOrThrow("shape").getListValue().getValuesList().stream()
            .map(size -> (long) size.getNumberValue())
            .toList();
    double[] numbers =
        input.getFieldsOrThrow("data").getListValue().getValuesList().stream()
            .mapToDouble(Value::getNumberValue)
            .toArray();
    String name = text(input, "name");
    switch (text(input, "datatype")) {
      case "UINT8":
        byte[] bytes = new byte[numbers.length];
        for (int index = 0; index < numbers.length; index++) {
          bytes[index] = (byte) (int) numbers[index];
        }
        return Tensor.of(name, shape, bytes);
      case "FP32":
        float[] floats = new float[numbers.length];
        for (int index = 0; index < numbers.length; index++) {
          floats[index] = (float) numbers[index];
        }
        return Tensor.of(name, shape, floats);
      case "INT64":
        long[] longs = new long[numbers.length];
        for (int index = 0; index < numbers.length; index++) {
          longs[index] = (long) numbers[index];
        }
        return Tensor.of(name, shape, longs);
      default:
        throw new IllegalArgumentException("this runner knows no such datatype: " + input);
    }
  }

  private static Selection selection(Struct arguments, String key) {
    return new Selection((long) number(arguments, key), text(arguments, "alias"), "");
  }

  private static ClientOptions options(Struct client) {
    ClientOptions options = new ClientOptions();
    double seconds = number(client, "timeout_seconds");
    if (seconds != 0) {
      options = options.withTimeout(Duration.ofMillis((long) (1000 * seconds)));
    }
    int attempts = (int) number(client, "max_attempts");
    if (attempts != 0) {
      options = options.withMaxAttempts(attempts);
    }
    int limit = (int) number(client, "max_message_bytes");
    if (limit != 0) {
      options = options.withMaxMessageBytes(limit);
    }
    if (!text(client, "ca_file").isEmpty()) {
      options = options.withTls(Path.of(text(client, "ca_file")));
    }
    if (!text(client, "token").isEmpty()) {
      options = options.withToken(text(client, "token"));
    }
    return options;
  }

  private static String text(Struct object, String key) {
    return object.getFieldsOrDefault(key, Value.getDefaultInstance()).getStringValue();
  }

  private static double number(Struct object, String key) {
    return object.getFieldsOrDefault(key, Value.getDefaultInstance()).getNumberValue();
  }

  private static Value of(String value) {
    return Value.newBuilder().setStringValue(value).build();
  }

  private static Value of(double value) {
    return Value.newBuilder().setNumberValue(value).build();
  }

  private static Value of(Struct.Builder value) {
    return Value.newBuilder().setStructValue(value).build();
  }

  private static Value of(ListValue.Builder value) {
    return Value.newBuilder().setListValue(value).build();
  }
}
