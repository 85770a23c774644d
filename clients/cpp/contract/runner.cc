// The contract runner: contract PLAN (see tests/contract/README.md).
#include <google/protobuf/struct.pb.h>
#include <google/protobuf/util/json_util.h>
#include <pollard/client.h>

#include <chrono>
#include <condition_variable>
#include <fstream>
#include <iostream>
#include <iterator>
#include <thread>

namespace {

using google::protobuf::Struct;
using google::protobuf::Value;

const char* const kCodes[] = {"OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED",
                              "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED",
                              "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL",
                              "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED"};

std::string Read(const std::string& path) {
  std::ifstream file;
  file.exceptions(std::ios::badbit | std::ios::failbit);
  file.open(path, std::ios::binary);
  return std::string(std::istreambuf_iterator<char>(file), {});
}

const Value& Field(const Struct& object, const std::string& name) {
  static const Value none;
  const auto found = object.fields().find(name);
  return found == object.fields().end() ? none : found->second;
}
std::string Text(const Struct& object, const std::string& name) { return Field(object, name).string_value(); }
double Number(const Struct& object, const std::string& name) { return Field(object, name).number_value(); }
std::chrono::milliseconds Seconds(double count) {
  return std::chrono::milliseconds(static_cast<std::int64_t>(count * 1000));
}

void Set(Struct* object, const std::string& name, const std::string& value) {
  (*object->mutable_fields())[name].set_string_value(value);
}
void Set(Struct* object, const std::string& name, double value) {
  (*object->mutable_fields())[name].set_number_value(value);
}
google::protobuf::ListValue* List(Struct* object, const std::string& name) {
  return (*object->mutable_fields())[name].mutable_list_value();
}

// Ends a call after some time, unless that is over before.
class Timer {
 public:
  Timer(pollard::Cancellation* cancellation, double seconds) {
    if (seconds == 0) return;
    thread_ = std::thread([this, cancellation, seconds] {
      std::unique_lock<std::mutex> lock(mutex_);
      if (!over_.wait_for(lock, Seconds(seconds), [this] { return done_; })) cancellation->Cancel();
    });
  }
  ~Timer() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      done_ = true;
    }
    over_.notify_all();
    if (thread_.joinable()) thread_.join();
  }

 private:
  std::mutex mutex_;
  std::condition_variable over_;
  bool done_ = false;
  std::thread thread_;
};

pollard::Options OptionsOf(const Struct& client) {
  pollard::Options options;
  if (const double seconds = Number(client, "timeout_seconds")) options.timeout = Seconds(seconds);
  if (const double attempts = Number(client, "max_attempts")) options.max_attempts = static_cast<int>(attempts);
  if (const double limit = Number(client, "max_message_bytes")) options.max_message_bytes = static_cast<int>(limit);
  if (const std::string file = Text(client, "ca_file"); !file.empty()) options.tls = pollard::Tls{Read(file), {}, {}};
  options.token = Text(client, "token");
  return options;
}

template <typename T>
pollard::Tensor TensorOf(const Struct& input, std::vector<std::int64_t> shape) {
  std::vector<T> values;
  for (const auto& value : Field(input, "data").list_value().values()) {
    values.push_back(static_cast<T>(value.number_value()));
  }
  return pollard::Tensor::Of(Text(input, "name"), std::move(shape), values);
}

pollard::Tensor InputOf(const Struct& input) {
  std::vector<std::int64_t> shape;
  for (const auto& size : Field(input, "shape").list_value().values()) {
    shape.push_back(static_cast<std::int64_t>(size.number_value()));
  }
  const std::string datatype = Text(input, "datatype");
  if (datatype == "UINT8") return TensorOf<std::uint8_t>(input, shape);
  if (datatype == "FP32") return TensorOf<float>(input, shape);
  if (datatype == "INT64") return TensorOf<std::int64_t>(input, shape);
  throw std::logic_error("this runner knows no datatype " + datatype);
}

Struct Predict(const Struct& each, const Struct& arguments, pollard::Cancellation* cancellation) {
  const pollard::VisionClient client(Text(each, "address"), OptionsOf(Field(each, "client").struct_value()));
  pollard::PredictOptions options;
  options.revision = static_cast<std::int64_t>(Number(arguments, "revision"));
  options.alias = Text(arguments, "alias");
  options.top_k = static_cast<std::uint32_t>(Number(arguments, "top_k"));
  options.cancellation = cancellation;
  const auto prediction = client.PredictFile(Text(arguments, "image_path"), Text(arguments, "model"), options);
  Struct answer;
  Set(&answer, "model", prediction.model);
  Set(&answer, "revision", static_cast<double>(prediction.revision));
  auto* labels = List(&answer, "labels");
  for (const auto& label : prediction.labels) {
    Struct* made = labels->add_values()->mutable_struct_value();
    Set(made, "index", label.index);
    Set(made, "label", label.label);
    Set(made, "score", label.score);
  }
  return answer;
}

Struct Infer(const Struct& each, const Struct& arguments, pollard::Cancellation* cancellation) {
  const pollard::InferenceClient client(Text(each, "address"), OptionsOf(Field(each, "client").struct_value()));
  std::vector<pollard::Tensor> inputs;
  for (const auto& input : Field(arguments, "inputs").list_value().values()) {
    inputs.push_back(InputOf(input.struct_value()));
  }
  pollard::InferOptions options;
  options.revision = static_cast<std::int64_t>(Number(arguments, "version"));
  options.alias = Text(arguments, "alias");
  options.id = Text(arguments, "id");
  options.cancellation = cancellation;
  for (int more = static_cast<int>(Number(each, "requests")); more > 1; --more) {
    client.Infer(Text(arguments, "model"), inputs, options);
  }
  const auto result = client.Infer(Text(arguments, "model"), inputs, options);
  Struct answer;
  Set(&answer, "model", result.model);
  Set(&answer, "version", static_cast<double>(result.version));
  Set(&answer, "id", result.id);
  auto* outputs = List(&answer, "outputs");
  for (const auto& output : result.outputs) {
    Struct* made = outputs->add_values()->mutable_struct_value();
    Set(made, "name", output.name);
    Set(made, "datatype", output.datatype);
    for (const auto size : output.shape) List(made, "shape")->add_values()->set_number_value(static_cast<double>(size));
    for (const auto value : output.Values<float>()) List(made, "data")->add_values()->set_number_value(value);
  }
  return answer;
}

Struct ListModels(const Struct& each, pollard::Cancellation* cancellation) {
  const pollard::ModelsClient client(Text(each, "address"), OptionsOf(Field(each, "client").struct_value()));
  pollard::CallOptions options;
  options.cancellation = cancellation;
  Struct answer;
  auto* models = List(&answer, "models");
  for (const auto& model : client.List(options)) {
    Struct* made = models->add_values()->mutable_struct_value();
    Set(made, "name", model.name);
    Set(made, "latest_revision", static_cast<double>(model.latest_revision));
  }
  return answer;
}

Struct Run(const Struct& each) {
  pollard::Cancellation cancellation;
  const Timer timer(&cancellation, Number(each, "cancel_after_seconds"));
  const Struct& arguments = Field(each, "arguments").struct_value();
  const std::string call = Text(each, "call");
  if (call == "predict") return Predict(each, arguments, &cancellation);
  if (call == "infer") return Infer(each, arguments, &cancellation);
  if (call == "list_models") return ListModels(each, &cancellation);
  throw std::logic_error("this runner knows no call " + call);
}

}  // namespace

int main(int, char** arguments) {
  Struct plan;
  if (!google::protobuf::util::JsonStringToMessage(Read(arguments[1]), &plan).ok()) return 2;
  for (const auto& value : Field(plan, "cases").list_value().values()) {
    const Struct& each = value.struct_value();
    Struct line;
    Set(&line, "case", Text(each, "case"));
    try {
      *(*line.mutable_fields())["answer"].mutable_struct_value() = Run(each);
    } catch (const pollard::Error& error) {
      Struct* made = (*line.mutable_fields())["error"].mutable_struct_value();
      Set(made, "code", std::string(kCodes[error.code()]));
      Set(made, "message", std::string(error.what()));
      Set(made, "reason", error.reason());
      Set(made, "domain", error.domain());
      Struct* metadata = (*made->mutable_fields())["metadata"].mutable_struct_value();
      for (const auto& [key, text] : error.metadata()) Set(metadata, key, text);
    } catch (const std::invalid_argument& refused) {
      Set((*line.mutable_fields())["refused"].mutable_struct_value(), "message", std::string(refused.what()));
    }
    std::string text;
    if (!google::protobuf::util::MessageToJsonString(line, &text).ok()) return 2;
    std::cout << text << std::endl;
  }
}
