package pollard

import (
	"context"
	"fmt"
	"strconv"

	"github.com/pollard-ai/pollard/clients/go/gen/inference"
	"google.golang.org/grpc/metadata"
)

// Inference asks an inference server, by the Open Inference Protocol.
type Inference struct {
	*client
	stub inference.GRPCInferenceServiceClient
}

// NewInference makes a client of an inference server at "HOST:PORT". It connects with the first call.
func NewInference(address string, options ...Option) (*Inference, error) {
	made, err := dial(address, options)
	if err != nil {
		return nil, err
	}
	return &Inference{made, inference.NewGRPCInferenceServiceClient(made.conn)}, nil
}

// InferOptions say which revision runs, and what of it is wanted.
type InferOptions struct {
	Selection
	// Outputs wanted, by name; empty for all.
	Outputs []string
	// ID is given back in the answer.
	ID string
}

// InferResult is the answer of a model to tensors.
type InferResult struct {
	Model string
	// Version is the revision that answered.
	Version int64
	// ID is that of the request.
	ID      string
	Outputs []Tensor
}

// Infer runs a model once. The first dimension of each input is the batch.
//
// The error is ErrInvalidArgument when an input does not fit the model, ErrNotFound when there is no such
// model, version or alias, and ErrUnavailable when the server's queue is full.
func (i *Inference) Infer(ctx context.Context, model string, inputs []Tensor, options *InferOptions) (*InferResult, error) {
	if options == nil {
		options = &InferOptions{}
	}
	if err := options.check(model); err != nil {
		return nil, err
	}
	request := &inference.ModelInferRequest{ModelName: model, Id: options.ID}
	if options.Revision != 0 {
		request.ModelVersion = strconv.FormatInt(options.Revision, 10)
	}
	for _, tensor := range inputs {
		request.Inputs = append(request.Inputs, &inference.ModelInferRequest_InferInputTensor{
			Name: tensor.Name, Datatype: tensor.Datatype, Shape: tensor.Shape,
		})
		request.RawInputContents = append(request.RawInputContents, tensor.Raw)
	}
	for _, name := range options.Outputs {
		request.Outputs = append(request.Outputs, &inference.ModelInferRequest_InferRequestedOutputTensor{Name: name})
	}
	ctx, cancel := i.bounded(ctx)
	defer cancel()
	if options.Alias != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "pollard-alias", options.Alias)
	}
	if options.StickyKey != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "pollard-sticky-key", options.StickyKey)
	}
	response, err := i.stub.ModelInfer(ctx, request)
	if err != nil {
		return nil, failure(ctx, err, "/inference.GRPCInferenceService/ModelInfer", i.address)
	}
	if len(response.RawOutputContents) != len(response.Outputs) {
		return nil, fmt.Errorf("pollard: the server answered with outputs that are not raw")
	}
	version, err := strconv.ParseInt(response.ModelVersion, 10, 64)
	if err != nil {
		return nil, fmt.Errorf("pollard: the server answered with the version %q", response.ModelVersion)
	}
	result := &InferResult{Model: response.ModelName, Version: version, ID: response.Id}
	for index, output := range response.Outputs {
		result.Outputs = append(result.Outputs, Tensor{
			Name: output.Name, Datatype: output.Datatype, Shape: output.Shape, Raw: response.RawOutputContents[index],
		})
	}
	return result, nil
}

// Ready says whether the server takes inference requests.
func (i *Inference) Ready(ctx context.Context) (bool, error) {
	ctx, cancel := i.bounded(ctx)
	defer cancel()
	response, err := i.stub.ServerReady(ctx, &inference.ServerReadyRequest{})
	if err != nil {
		return false, failure(ctx, err, "/inference.GRPCInferenceService/ServerReady", i.address)
	}
	return response.Ready, nil
}

// Metadata describes a model's inputs and outputs.
func (i *Inference) Metadata(ctx context.Context, model string) (*inference.ModelMetadataResponse, error) {
	if err := (Selection{}).check(model); err != nil {
		return nil, err
	}
	ctx, cancel := i.bounded(ctx)
	defer cancel()
	response, err := i.stub.ModelMetadata(ctx, &inference.ModelMetadataRequest{Name: model})
	return response, failure(ctx, err, "/inference.GRPCInferenceService/ModelMetadata", i.address)
}
