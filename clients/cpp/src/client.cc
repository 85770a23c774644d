#include "pollard/client.h"

#include <arpa/inet.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <sstream>
#include <utility>

#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "inference/grpc_service.grpc.pb.h"
#include "pollard/models/v1/model_service.grpc.pb.h"
#include "pollard/vision/v1/vision_service.grpc.pb.h"

namespace pollard {
namespace {

constexpr int kPageSize = 200;

// With `spread`, requests go in turn to the servers that are there and say that they are well; one that
// cannot be asked counts as well.
constexpr const char* kSpread =
    R"("loadBalancingConfig": [{"round_robin": {}}], "healthCheckConfig": {"serviceName": ""})";

// Methods without side effects. gRPC's servers answer CANCELLED to what reaches them while they stop.
std::string Retries(int max_attempts) {
  return R"("methodConfig": [{"name": [
      {"service": "inference.GRPCInferenceService", "method": "ServerReady"},
      {"service": "inference.GRPCInferenceService", "method": "ModelInfer"},
      {"service": "pollard.vision.v1.VisionService", "method": "Predict"},
      {"service": "pollard.models.v1.ModelService", "method": "ListModels"}],
    "retryPolicy": {"initialBackoff": "0.1s", "maxBackoff": "2s", "backoffMultiplier": 2,
      "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"], "maxAttempts": )" +
         std::to_string(max_attempts) + "}}]";
}

std::string ServiceConfig(int max_attempts, bool spread) {
  std::string config = "{";
  if (spread) config += kSpread;
  if (spread && max_attempts > 1) config += ", ";
  if (max_attempts > 1) config += Retries(max_attempts);
  return config + "}";
}

bool IsList(const std::string& address) {
  return address.find(',') != std::string::npos && address.find(":///") == std::string::npos;
}

bool IsPort(const std::string& text) {
  if (text.empty() || text.size() > 5 || text.find_first_not_of("0123456789") != std::string::npos) return false;
  const int number = std::stoi(text);
  return number >= 1 && number <= 65535;
}

// Returns an address as gRPC's target; of several it takes IP addresses of one kind.
std::string Target(const std::string& address, bool encrypted) {
  if (!IsList(address)) return address;
  if (encrypted) {
    throw std::invalid_argument("the addresses \"" + address +
                                "\" have no one name that a certificate could be for: with `tls` give "
                                "dns:///NAME:PORT");
  }
  const bool v6 = address[0] == '[';
  std::istringstream list(address + ',');  // what is behind the last comma counts, too
  for (std::string part; std::getline(list, part, ',');) {
    const auto colon = part.rfind(':');
    std::string host = colon == std::string::npos ? "" : part.substr(0, colon);
    if (v6 && host.size() > 2 && host.front() == '[' && host.back() == ']') host = host.substr(1, host.size() - 2);
    in6_addr parsed;
    if (!IsPort(part.substr(colon + 1)) || inet_pton(v6 ? AF_INET6 : AF_INET, host.c_str(), &parsed) != 1) {
      throw std::invalid_argument("\"" + part + "\" of the addresses \"" + address +
                                  "\" must be an IP address with a port, all of one kind; for names give one "
                                  "that resolves to all servers, as dns:///NAME:PORT");
    }
  }
  return (v6 ? "ipv6:" : "ipv4:") + address;
}

// gRPC's own credentials for tokens are meant for OAuth and say so in their errors; this is all there is to it.
class Bearer : public grpc::MetadataCredentialsPlugin {
 public:
  explicit Bearer(const std::string& token) : value_("Bearer " + token) {}
  grpc::Status GetMetadata(grpc::string_ref, grpc::string_ref, const grpc::AuthContext&,
                           std::multimap<grpc::string, grpc::string>* metadata) override {
    metadata->emplace("authorization", value_);
    return grpc::Status::OK;
  }
  bool IsBlocking() const override { return false; }

 private:
  std::string value_;
};

std::shared_ptr<grpc::ChannelCredentials> Credentials(const Options& options) {
  if (!options.tls) {
    if (!options.token.empty()) throw std::invalid_argument("a token is sent over TLS only; give `tls` too");
    return grpc::InsecureChannelCredentials();
  }
  const Tls& tls = *options.tls;
  if (tls.certificate_chain.empty() != tls.private_key.empty()) {
    throw std::invalid_argument("certificate_chain and private_key are given together or not at all");
  }
  grpc::SslCredentialsOptions ssl;
  ssl.pem_root_certs = tls.root_certificates;
  ssl.pem_cert_chain = tls.certificate_chain;
  ssl.pem_private_key = tls.private_key;
  auto made = grpc::SslCredentials(ssl);
  if (options.token.empty()) return made;
  return grpc::CompositeChannelCredentials(
      made, grpc::MetadataCredentialsFromPlugin(std::make_unique<Bearer>(options.token)));
}

google::rpc::ErrorInfo ErrorInfoOf(const grpc::Status& status) {
  google::rpc::ErrorInfo info;
  google::rpc::Status details;
  if (details.ParseFromString(status.error_details())) {
    for (const auto& detail : details.details()) {
      if (detail.UnpackTo(&info)) break;
    }
  }
  return info;
}

[[noreturn]] void Throw(const grpc::Status& status, const std::string& method, const std::string& address) {
  switch (status.error_code()) {
    case grpc::StatusCode::CANCELLED: throw Cancelled(status, method, address);
    case grpc::StatusCode::INVALID_ARGUMENT: throw InvalidArgument(status, method, address);
    case grpc::StatusCode::DEADLINE_EXCEEDED: throw DeadlineExceeded(status, method, address);
    case grpc::StatusCode::NOT_FOUND: throw NotFound(status, method, address);
    case grpc::StatusCode::PERMISSION_DENIED: throw PermissionDenied(status, method, address);
    case grpc::StatusCode::RESOURCE_EXHAUSTED: throw ResourceExhausted(status, method, address);
    case grpc::StatusCode::FAILED_PRECONDITION: throw FailedPrecondition(status, method, address);
    case grpc::StatusCode::INTERNAL: throw Internal(status, method, address);
    case grpc::StatusCode::UNAVAILABLE: throw Unavailable(status, method, address);
    case grpc::StatusCode::UNAUTHENTICATED: throw Unauthenticated(status, method, address);
    default: throw Error(status, method, address);
  }
}

// Written out because a std::regex shows in the rate of requests.
bool IsName(const std::string& text) {
  const auto alphanumeric = [](char c) { return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9'); };
  return !text.empty() && text.size() <= 63 && alphanumeric(text[0]) &&
         std::all_of(text.begin(), text.end(),
                     [&](char c) { return alphanumeric(c) || c == '.' || c == '_' || c == '-'; });
}

void Check(const std::string& model, const CallOptions& options) {
  if (!IsName(model)) {
    throw std::invalid_argument("model name \"" + model +
                                "\" is not valid: use 1 to 63 characters out of a-z, 0-9, '-', '_' and '.', "
                                "beginning with a letter or digit");
  }
  if (options.revision < 0) throw std::invalid_argument("revision must be 1 or more");
  if (options.revision != 0 && !options.alias.empty()) {
    throw std::invalid_argument("give a revision or an alias, not both");
  }
}

template <typename Service>
std::shared_ptr<void> NewStub(const std::shared_ptr<grpc::Channel>& channel) {
  return std::shared_ptr<typename Service::StubInterface>(Service::NewStub(channel));
}

template <typename Service>
typename Service::StubInterface& StubOf(const std::shared_ptr<void>& stub) {
  return *static_cast<typename Service::StubInterface*>(stub.get());
}

std::string LastPart(const std::string& name) { return name.substr(name.rfind('/') + 1); }

Label LabelOf(const vision::v1::ScoredLabel& message) {
  return {message.index(), message.label(), message.score()};
}

}  // namespace

// One call: its context, with a deadline, that a Cancellation may end.
class Call {
 public:
  Call(std::chrono::milliseconds timeout, const CallOptions& options) : cancellation_(options.cancellation) {
    context.set_deadline(std::chrono::system_clock::now() + options.timeout.value_or(timeout));
    if (cancellation_ != nullptr) cancellation_->Add(&context);
  }
  ~Call() {
    if (cancellation_ != nullptr) cancellation_->Remove(&context);
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  grpc::ClientContext context;

 private:
  Cancellation* cancellation_;
};

void Cancellation::Cancel() {
  const std::lock_guard<std::mutex> lock(mutex_);
  cancelled_ = true;
  for (auto* context : contexts_) context->TryCancel();
}

void Cancellation::Add(grpc::ClientContext* context) {
  const std::lock_guard<std::mutex> lock(mutex_);
  contexts_.insert(context);
  if (cancelled_) context->TryCancel();
}

void Cancellation::Remove(grpc::ClientContext* context) {
  const std::lock_guard<std::mutex> lock(mutex_);
  contexts_.erase(context);
}

Error::Error(const grpc::Status& status, std::string method, std::string address)
    : std::runtime_error(status.error_message()),
      code_(status.error_code()),
      method_(std::move(method)),
      address_(std::move(address)) {
  const auto info = ErrorInfoOf(status);
  reason_ = info.reason();
  domain_ = info.domain();
  metadata_.insert(info.metadata().begin(), info.metadata().end());
}

Client::Client(std::string address, const Options& options)
    : address_(std::move(address)), timeout_(options.timeout) {
  if (options.max_attempts < 1 || options.max_attempts > 5) {
    throw std::invalid_argument("max_attempts must be 1 to 5, not " + std::to_string(options.max_attempts));
  }
  if (options.timeout <= std::chrono::milliseconds::zero()) {
    throw std::invalid_argument("timeout must be above 0");
  }
  grpc::ChannelArguments arguments;
  arguments.SetMaxSendMessageSize(options.max_message_bytes);
  arguments.SetMaxReceiveMessageSize(options.max_message_bytes);
  // A server that restarts should be found again in a second, not in the default 20.
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 200);
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 200);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 2000);
  // A proxy from the environment must not come between a client and its services.
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  // A machine that goes without a word is noticed while a call waits for it.
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 10000);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 5000);
  // For the kernel; for the answer to a ping, which a busy process may owe for seconds, newer gRPC waits a minute
  // unless it is told this.
  arguments.SetInt("grpc.http2.ping_timeout_ms", 10000);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  const bool spread = IsList(address_) || address_.rfind("dns:", 0) == 0;
  if (spread || options.max_attempts > 1) {
    arguments.SetServiceConfigJSON(ServiceConfig(options.max_attempts, spread));
  }
  if (options.max_attempts == 1) arguments.SetInt(GRPC_ARG_ENABLE_RETRIES, 0);
  const std::string target = Target(address_, options.tls.has_value());
  channel_ = grpc::CreateCustomChannel(target, Credentials(options), arguments);
}

VisionClient::VisionClient(std::string address, const Options& options) : Client(std::move(address), options) {
  stub_ = NewStub<vision::v1::VisionService>(channel_);
}

Prediction VisionClient::Predict(const std::string& image, const std::string& model,
                                 const PredictOptions& options) const {
  Check(model, options);
  vision::v1::PredictRequest request;
  request.mutable_model()->set_model(model);
  request.mutable_model()->set_sticky_key(options.sticky_key);
  if (options.revision != 0) request.mutable_model()->set_revision(options.revision);
  if (!options.alias.empty()) request.mutable_model()->set_alias(options.alias);
  request.mutable_image()->set_content(image);
  request.mutable_options()->set_top_k(options.top_k);
  request.mutable_options()->set_embedding(options.embedding);

  vision::v1::PredictResponse response;
  Call call(timeout_, options);
  const auto status = StubOf<vision::v1::VisionService>(stub_).Predict(&call.context, request, &response);
  if (!status.ok()) Throw(status, "/pollard.vision.v1.VisionService/Predict", address_);

  Prediction prediction{response.model(), response.revision(), {}, {}, {}, {}};
  for (const auto& label : response.classification().labels()) prediction.labels.push_back(LabelOf(label));
  for (const auto& object : response.detection().objects()) {
    prediction.objects.push_back(
        {LabelOf(object.label()), object.x1(), object.y1(), object.x2(), object.y2()});
  }
  for (const auto& area : response.segmentation().areas()) prediction.labels.push_back(LabelOf(area));
  prediction.mask_png = response.segmentation().png();
  const auto& values = response.has_classification() ? response.classification().embedding().values()
                                                     : response.embedding().values();
  prediction.embedding.assign(values.begin(), values.end());
  return prediction;
}

Prediction VisionClient::PredictFile(const std::string& path, const std::string& model,
                                     const PredictOptions& options) const {
  std::ifstream file;
  file.exceptions(std::ios::badbit | std::ios::failbit);
  file.open(path, std::ios::binary);
  return Predict(std::string(std::istreambuf_iterator<char>(file), {}), model, options);
}

InferenceClient::InferenceClient(std::string address, const Options& options)
    : Client(std::move(address), options) {
  stub_ = NewStub<inference::GRPCInferenceService>(channel_);
}

InferResult InferenceClient::Infer(const std::string& model, const std::vector<Tensor>& inputs,
                                   const InferOptions& options) const {
  Check(model, options);
  inference::ModelInferRequest request;
  request.set_model_name(model);
  if (options.revision != 0) request.set_model_version(std::to_string(options.revision));
  request.set_id(options.id);
  for (const auto& tensor : inputs) {
    auto* input = request.add_inputs();
    input->set_name(tensor.name);
    input->set_datatype(tensor.datatype);
    for (const auto size : tensor.shape) input->add_shape(size);
    request.add_raw_input_contents(tensor.raw);
  }
  for (const auto& name : options.outputs) request.add_outputs()->set_name(name);

  inference::ModelInferResponse response;
  Call call(timeout_, options);
  if (!options.alias.empty()) call.context.AddMetadata("pollard-alias", options.alias);
  if (!options.sticky_key.empty()) call.context.AddMetadata("pollard-sticky-key", options.sticky_key);
  const auto status =
      StubOf<inference::GRPCInferenceService>(stub_).ModelInfer(&call.context, request, &response);
  if (!status.ok()) Throw(status, "/inference.GRPCInferenceService/ModelInfer", address_);
  if (response.raw_output_contents_size() != response.outputs_size()) {
    throw std::runtime_error("the server answered with outputs that are not raw");
  }
  InferResult result{response.model_name(), std::stoll(response.model_version()), response.id(), {}};
  for (int index = 0; index < response.outputs_size(); ++index) {
    const auto& output = response.outputs(index);
    result.outputs.push_back({output.name(),
                              output.datatype(),
                              {output.shape().begin(), output.shape().end()},
                              std::move(*response.mutable_raw_output_contents(index))});
  }
  return result;
}

bool InferenceClient::Ready(const CallOptions& options) const {
  inference::ServerReadyResponse response;
  Call call(timeout_, options);
  const auto status =
      StubOf<inference::GRPCInferenceService>(stub_).ServerReady(&call.context, {}, &response);
  if (!status.ok()) Throw(status, "/inference.GRPCInferenceService/ServerReady", address_);
  return response.ready();
}

ModelsClient::ModelsClient(std::string address, const Options& options) : Client(std::move(address), options) {
  stub_ = NewStub<models::v1::ModelService>(channel_);
}

std::vector<Model> ModelsClient::List(const CallOptions& options) const {
  auto& stub = StubOf<models::v1::ModelService>(stub_);
  std::vector<Model> found;
  models::v1::ListModelsRequest request;
  request.set_page_size(kPageSize);
  do {
    models::v1::ListModelsResponse response;
    Call call(timeout_, options);
    const auto status = stub.ListModels(&call.context, request, &response);
    if (!status.ok()) Throw(status, "/pollard.models.v1.ModelService/ListModels", address_);
    for (const auto& message : response.models()) {
      Model model{LastPart(message.name()), message.description(), {}, message.latest_revision(), {}};
      model.labels.insert(message.labels().begin(), message.labels().end());
      for (const auto& alias : message.aliases()) model.aliases[LastPart(alias.name())] = alias.revision();
      found.push_back(std::move(model));
    }
    request.set_page_token(response.next_page_token());
  } while (!request.page_token().empty());
  return found;
}

std::size_t internal::CheckedCount(const Tensor& tensor, std::size_t bytes, std::size_t value_size) {
  std::size_t count = 1;
  for (const auto size : tensor.shape) {
    if (size < 0) throw std::invalid_argument("tensor " + tensor.name + " has a negative size in its shape");
    count *= static_cast<std::size_t>(size);
  }
  if (count * value_size != bytes) {
    throw std::invalid_argument("tensor " + tensor.name + " has " + std::to_string(bytes) +
                                " bytes, which do not fit its shape and datatype");
  }
  return count;
}

}  // namespace pollard
