// Pollard's client for C++17: images in, answers out; tensors in, tensors out; the models there are.
//
// Every call has a deadline, and calls without side effects that meet UNAVAILABLE are sent again by gRPC's
// service config. What fails throws an Error. A client may be used by many threads at once.
#pragma once

#include <grpcpp/grpcpp.h>

#include <chrono>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace pollard {

// A server, or the way to it, answered with a status. See `NotFound` and its like below.
class Error : public std::runtime_error {
 public:
  Error(const grpc::Status& status, std::string method, std::string address);

  grpc::StatusCode code() const { return code_; }
  // Reason in upper snake case, such as "REVISION_UNKNOWN"; empty when the server gave none.
  const std::string& reason() const { return reason_; }
  // Who defines the reason: "pollard.ai" for Pollard's services.
  const std::string& domain() const { return domain_; }
  // The values that the message speaks of.
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  // The gRPC method, such as "/pollard.vision.v1.VisionService/Predict".
  const std::string& method() const { return method_; }
  const std::string& address() const { return address_; }

 private:
  grpc::StatusCode code_;
  std::string reason_, domain_, method_, address_;
  std::map<std::string, std::string> metadata_;
};

// An Error of one status, to be caught by its name.
template <grpc::StatusCode code>
class ErrorOf : public Error {
  using Error::Error;
};
using Cancelled = ErrorOf<grpc::StatusCode::CANCELLED>;
using InvalidArgument = ErrorOf<grpc::StatusCode::INVALID_ARGUMENT>;
using DeadlineExceeded = ErrorOf<grpc::StatusCode::DEADLINE_EXCEEDED>;
using NotFound = ErrorOf<grpc::StatusCode::NOT_FOUND>;
using PermissionDenied = ErrorOf<grpc::StatusCode::PERMISSION_DENIED>;
using ResourceExhausted = ErrorOf<grpc::StatusCode::RESOURCE_EXHAUSTED>;
using FailedPrecondition = ErrorOf<grpc::StatusCode::FAILED_PRECONDITION>;
using Internal = ErrorOf<grpc::StatusCode::INTERNAL>;
using Unavailable = ErrorOf<grpc::StatusCode::UNAVAILABLE>;
using Unauthenticated = ErrorOf<grpc::StatusCode::UNAUTHENTICATED>;

// An encrypted connection, and what the two sides show each other; the contents of PEM files.
struct Tls {
  // Authorities that may have signed the server's certificate; empty for those that gRPC trusts.
  std::string root_certificates;
  // This client's certificate chain and key, for servers that ask for one.
  std::string certificate_chain, private_key;
};

// How a client is made.
struct Options {
  // Deadline of calls that give none.
  std::chrono::milliseconds timeout{30'000};
  // How often a call without side effects that meets UNAVAILABLE is sent in all, 1 to 5.
  int max_attempts = 4;
  // Largest message in either direction.
  int max_message_bytes = 64 << 20;
  // Encrypts the connection.
  std::optional<Tls> tls;
  // Sent with every call as "authorization: Bearer …"; needs `tls`.
  std::string token;
};

// Ends the calls that it was given to, from any thread; they throw Cancelled.
class Cancellation {
 public:
  void Cancel();

 private:
  friend class Call;
  void Add(grpc::ClientContext* context);
  void Remove(grpc::ClientContext* context);

  std::mutex mutex_;
  bool cancelled_ = false;
  std::set<grpc::ClientContext*> contexts_;
};

// How one call is made, and which revision of a model it is for: by default the alias "production".
struct CallOptions {
  // Deadline; by default the client's.
  std::optional<std::chrono::milliseconds> timeout;
  // A revision by number; 0 for none.
  std::int64_t revision = 0;
  // An alias, such as "candidate".
  std::string alias;
  // Calls with the same key get the same revision of a rollout.
  std::string sticky_key;
  // Given to end the call early; it must outlive the call.
  Cancellation* cancellation = nullptr;
};

// What all clients share: one channel to one server, or to several.
class Client {
 public:
  const std::string& address() const { return address_; }

 protected:
  Client(std::string address, const Options& options);

  std::string address_;
  std::chrono::milliseconds timeout_;
  std::shared_ptr<grpc::Channel> channel_;
  // The generated stub, of which this header knows nothing.
  std::shared_ptr<void> stub_;
};

struct Label {
  std::uint32_t index = 0;
  // Name of the class; empty when the bundle names none.
  std::string label;
  // 0 to 1 where the bundle says so.
  float score = 0;
};

// A box around something, in pixels of the image as it was sent.
struct DetectedObject {
  Label label;
  float x1 = 0, y1 = 0, x2 = 0, y2 = 0;
};

// The answer for one image.
struct Prediction {
  std::string model;
  // The revision that answered.
  std::int64_t revision = 0;
  // Best first; empty for models that do not classify.
  std::vector<Label> labels;
  // Best first; empty for models that do not detect.
  std::vector<DetectedObject> objects;
  // Where it was asked for or is all that the model gives.
  std::vector<float> embedding;
  // A PNG of class indices; empty for models that do not segment.
  std::string mask_png;
};

struct PredictOptions : CallOptions {
  // Number of labels; 0 means what the bundle says.
  std::uint32_t top_k = 0;
  // Ask for the embedding too, where the bundle has one.
  bool embedding = false;
};

// Asks a preprocess server about images.
class VisionClient : public Client {
 public:
  explicit VisionClient(std::string address = "127.0.0.1:8011", const Options& options = {});

  // Answer for the bytes of an image file. Throws InvalidArgument when they are damaged, empty, too large or
  // no image, and NotFound when there is no such model, revision or alias.
  Prediction Predict(const std::string& image, const std::string& model, const PredictOptions& options = {}) const;
  // Answer for an image file; throws std::ios_base::failure when it cannot be read.
  Prediction PredictFile(const std::string& path, const std::string& model,
                         const PredictOptions& options = {}) const;
};

// An array of numbers, as the protocol carries it.
struct Tensor {
  std::string name;
  // As the protocol names it, such as "UINT8" or "FP32".
  std::string datatype;
  std::vector<std::int64_t> shape;
  // The values row by row, little-endian.
  std::string raw;

  // Make a tensor of values; their type gives its datatype.
  template <typename T>
  static Tensor Of(std::string name, std::vector<std::int64_t> shape, const std::vector<T>& values);
  // The values; throws std::invalid_argument when T is not the type of the datatype.
  template <typename T>
  std::vector<T> Values() const;
};

struct InferOptions : CallOptions {
  // Outputs wanted, by name; empty for all.
  std::vector<std::string> outputs;
  // Given back in the answer.
  std::string id;
};

// The answer of a model to tensors.
struct InferResult {
  std::string model;
  // The revision that answered.
  std::int64_t version = 0;
  std::string id;
  std::vector<Tensor> outputs;
};

// Asks an inference server, by the Open Inference Protocol.
class InferenceClient : public Client {
 public:
  explicit InferenceClient(std::string address = "127.0.0.1:8001", const Options& options = {});

  // Run a model once; the first dimension of each input is the batch. Throws InvalidArgument when an input does
  // not fit the model, and NotFound when there is no such model, revision or alias.
  InferResult Infer(const std::string& model, const std::vector<Tensor>& inputs,
                    const InferOptions& options = {}) const;
  // Say whether the server takes inference requests.
  bool Ready(const CallOptions& options = {}) const;
};

// A model of the registry.
struct Model {
  std::string name, description;
  std::map<std::string, std::string> labels;
  // Number of the newest revision; 0 when there is none.
  std::int64_t latest_revision = 0;
  // Revisions by alias.
  std::map<std::string, std::int64_t> aliases;
};

// Asks the model management server.
class ModelsClient : public Client {
 public:
  explicit ModelsClient(std::string address = "127.0.0.1:8021", const Options& options = {});

  // All models, by name.
  std::vector<Model> List(const CallOptions& options = {}) const;
};

namespace internal {

template <typename T>
constexpr const char* Datatype() {
  if constexpr (std::is_same_v<T, std::uint8_t>) return "UINT8";
  else if constexpr (std::is_same_v<T, std::uint16_t>) return "UINT16";
  else if constexpr (std::is_same_v<T, std::uint32_t>) return "UINT32";
  else if constexpr (std::is_same_v<T, std::uint64_t>) return "UINT64";
  else if constexpr (std::is_same_v<T, std::int8_t>) return "INT8";
  else if constexpr (std::is_same_v<T, std::int16_t>) return "INT16";
  else if constexpr (std::is_same_v<T, std::int32_t>) return "INT32";
  else if constexpr (std::is_same_v<T, std::int64_t>) return "INT64";
  else if constexpr (std::is_same_v<T, float>) return "FP32";
  else if constexpr (std::is_same_v<T, double>) return "FP64";
  else static_assert(!sizeof(T), "tensors hold fixed-width integers, float or double");
}

// Number of values of a shape; throws std::invalid_argument when `bytes` are not so many of that size.
std::size_t CheckedCount(const Tensor& tensor, std::size_t bytes, std::size_t value_size);

}  // namespace internal

template <typename T>
Tensor Tensor::Of(std::string name, std::vector<std::int64_t> shape, const std::vector<T>& values) {
  Tensor tensor{std::move(name), internal::Datatype<T>(), std::move(shape), {}};
  internal::CheckedCount(tensor, values.size() * sizeof(T), sizeof(T));
  tensor.raw.assign(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
  return tensor;
}

template <typename T>
std::vector<T> Tensor::Values() const {
  if (datatype != internal::Datatype<T>()) {
    throw std::invalid_argument("tensor " + name + " is " + datatype + " and not " + internal::Datatype<T>());
  }
  std::vector<T> values(internal::CheckedCount(*this, raw.size(), sizeof(T)));
  if (!values.empty()) std::memcpy(values.data(), raw.data(), raw.size());
  return values;
}

}  // namespace pollard
