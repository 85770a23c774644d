// How fast the client asks, against gRPC's bare stub (bench/clients.py runs it):
//   rate server                                 prints its port, and answers until its input ends
//   rate bare|client ADDRESS SECONDS CALLERS    prints the requests that were answered
#include <pollard/client.h>

#include <atomic>
#include <chrono>
#include <iostream>
#include <thread>

#include "inference/grpc_service.grpc.pb.h"

namespace {

constexpr int kPixels = 28 * 28;

// Answers each tensor by the same ten scores, so that next to nothing but gRPC takes time.
class Server final : public inference::GRPCInferenceService::Service {
  grpc::Status ModelInfer(grpc::ServerContext*, const inference::ModelInferRequest* request,
                          inference::ModelInferResponse* response) override {
    response->set_model_name(request->model_name());
    response->set_model_version("1");
    auto* output = response->add_outputs();
    output->set_name("scores");
    output->set_datatype("FP32");
    output->add_shape(1);
    output->add_shape(10);
    response->add_raw_output_contents(std::string(40, '\0'));
    return grpc::Status::OK;
  }
};

void Serve() {
  Server service;
  int port = 0;
  grpc::ServerBuilder builder;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(&service);
  const auto server = builder.BuildAndStart();
  std::cout << port << std::endl;
  std::cin.get();
  server->Shutdown();
}

void Bare(inference::GRPCInferenceService::Stub* stub) {
  inference::ModelInferRequest request;
  request.set_model_name("digits");
  auto* input = request.add_inputs();
  input->set_name("image");
  input->set_datatype("UINT8");
  for (const int size : {1, 28, 28, 1}) input->add_shape(size);
  request.add_raw_input_contents(std::string(kPixels, '\1'));
  inference::ModelInferResponse response;
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(30));
  const auto status = stub->ModelInfer(&context, request, &response);
  if (!status.ok() || response.raw_output_contents(0).size() != 40) std::abort();
}

}  // namespace

int main(int count, char** arguments) {
  const std::string mode = count > 1 ? arguments[1] : "";
  if (mode == "server") {
    Serve();
    return 0;
  }
  if (count != 5) return 2;
  const pollard::InferenceClient client(arguments[2]);
  const auto stub =
      inference::GRPCInferenceService::NewStub(grpc::CreateChannel(arguments[2], grpc::InsecureChannelCredentials()));
  const std::vector<std::uint8_t> pixels(kPixels, 1);
  std::atomic<long> answered{0};
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(std::stod(arguments[3]));
  std::vector<std::thread> callers;
  for (int caller = 0; caller < std::stoi(arguments[4]); ++caller) {
    callers.emplace_back([&] {
      while (std::chrono::steady_clock::now() < end) {
        if (mode == "bare") {
          Bare(stub.get());
        } else {
          const auto result = client.Infer("digits", {pollard::Tensor::Of("image", {1, 28, 28, 1}, pixels)});
          if (result.outputs[0].Values<float>().size() != 10) std::abort();
        }
        ++answered;
      }
    });
  }
  for (auto& caller : callers) caller.join();
  std::cout << answered << std::endl;
}
