// Command contract is the contract runner: contract PLAN (see tests/contract/README.md).
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"

	pollard "github.com/pollard-ai/pollard/clients/go"
	"google.golang.org/grpc/codes"
)

type testCase struct {
	Case     string
	Call     string
	Address  string
	Requests int
	Client   struct {
		TimeoutSeconds  float64 `json:"timeout_seconds"`
		MaxAttempts     int     `json:"max_attempts"`
		MaxMessageBytes int     `json:"max_message_bytes"`
		CAFile          string  `json:"ca_file"`
		Token           string
	}
	Arguments struct {
		Model     string
		ImagePath string `json:"image_path"`
		Revision  int64
		Version   int64
		Alias     string
		TopK      uint32 `json:"top_k"`
		ID        string
		Inputs    []tensor
	}
	CancelAfterSeconds float64 `json:"cancel_after_seconds"`
}

type tensor struct {
	Name     string    `json:"name"`
	Datatype string    `json:"datatype"`
	Shape    []int64   `json:"shape"`
	Data     []float64 `json:"data"`
}

type object map[string]any

// refusal is why no client could be made.
type refusal struct{ error }

var names = map[codes.Code]string{
	codes.Canceled: "CANCELLED", codes.Unknown: "UNKNOWN", codes.InvalidArgument: "INVALID_ARGUMENT",
	codes.DeadlineExceeded: "DEADLINE_EXCEEDED", codes.NotFound: "NOT_FOUND",
	codes.AlreadyExists: "ALREADY_EXISTS", codes.PermissionDenied: "PERMISSION_DENIED",
	codes.ResourceExhausted: "RESOURCE_EXHAUSTED", codes.FailedPrecondition: "FAILED_PRECONDITION",
	codes.Aborted: "ABORTED", codes.OutOfRange: "OUT_OF_RANGE", codes.Unimplemented: "UNIMPLEMENTED",
	codes.Internal: "INTERNAL", codes.Unavailable: "UNAVAILABLE", codes.DataLoss: "DATA_LOSS",
	codes.Unauthenticated: "UNAUTHENTICATED",
}

func main() {
	text, err := os.ReadFile(os.Args[1])
	check(err)
	var plan struct{ Cases []testCase }
	check(json.Unmarshal(text, &plan))
	before := runtime.NumGoroutine()
	out := json.NewEncoder(os.Stdout)
	for _, each := range plan.Cases {
		answer, err := run(each)
		line := object{"case": each.Case, "answer": answer}
		var failed *pollard.Error
		var refused refusal
		if errors.As(err, &refused) {
			line = object{"case": each.Case, "refused": object{"message": refused.Error()}}
		} else if errors.As(err, &failed) {
			line = object{"case": each.Case, "error": object{
				"code": names[failed.Code], "message": failed.Message, "reason": failed.Reason,
				"domain": failed.Domain, "metadata": failed.Metadata,
			}}
			if failed.Code == codes.Canceled && !errors.Is(err, context.Canceled) {
				check(fmt.Errorf("%s: the error does not wrap context.Canceled", each.Case))
			}
		} else {
			check(err)
		}
		check(out.Encode(line))
	}
	// Every client is closed, so nothing of them may run any more.
	for give := time.Now().Add(20 * time.Second); runtime.NumGoroutine() > before; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(give) {
			check(fmt.Errorf("%d goroutines are left of the clients", runtime.NumGoroutine()-before))
		}
	}
}

func run(each testCase) (object, error) {
	var options []pollard.Option
	if each.Client.TimeoutSeconds != 0 {
		options = append(options, pollard.WithTimeout(seconds(each.Client.TimeoutSeconds)))
	}
	if each.Client.MaxAttempts != 0 {
		options = append(options, pollard.WithMaxAttempts(each.Client.MaxAttempts))
	}
	if each.Client.MaxMessageBytes != 0 {
		options = append(options, pollard.WithMaxMessageBytes(each.Client.MaxMessageBytes))
	}
	if each.Client.CAFile != "" {
		pem, err := os.ReadFile(each.Client.CAFile)
		check(err)
		pool := x509.NewCertPool()
		pool.AppendCertsFromPEM(pem)
		options = append(options, pollard.WithTLS(&tls.Config{RootCAs: pool}))
	}
	if each.Client.Token != "" {
		options = append(options, pollard.WithToken(each.Client.Token))
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	if each.CancelAfterSeconds != 0 {
		defer time.AfterFunc(seconds(each.CancelAfterSeconds), cancel).Stop()
	}
	arguments := each.Arguments
	switch each.Call {
	case "predict":
		vision, err := pollard.NewVision(each.Address, options...)
		check(err)
		defer vision.Close()
		prediction, err := vision.PredictFile(ctx, arguments.ImagePath, arguments.Model, &pollard.PredictOptions{
			Selection: pollard.Selection{Revision: arguments.Revision, Alias: arguments.Alias}, TopK: arguments.TopK,
		})
		if err != nil {
			return nil, err
		}
		labels := []object{}
		for _, label := range prediction.Labels {
			labels = append(labels, object{"index": label.Index, "label": label.Label, "score": label.Score})
		}
		return object{"model": prediction.Model, "revision": prediction.Revision, "labels": labels}, nil
	case "infer":
		return infer(ctx, each, options)
	case "list_models":
		client, err := pollard.NewModels(each.Address, options...)
		if err != nil {
			return nil, refusal{err}
		}
		defer client.Close()
		found, err := client.List(ctx)
		if err != nil {
			return nil, err
		}
		models := []object{}
		for _, model := range found {
			models = append(models, object{"name": model.Name, "latest_revision": model.LatestRevision})
		}
		return object{"models": models}, nil
	}
	return nil, fmt.Errorf("this runner knows no call %q", each.Call)
}

func infer(ctx context.Context, each testCase, options []pollard.Option) (object, error) {
	client, err := pollard.NewInference(each.Address, options...)
	check(err)
	defer client.Close()
	var inputs []pollard.Tensor
	for _, input := range each.Arguments.Inputs {
		made, err := toTensor(input)
		check(err)
		inputs = append(inputs, made)
	}
	var result *pollard.InferResult
	for made := 0; made == 0 || made < each.Requests; made++ {
		result, err = client.Infer(ctx, each.Arguments.Model, inputs, &pollard.InferOptions{
			Selection: pollard.Selection{Revision: each.Arguments.Version, Alias: each.Arguments.Alias}, ID: each.Arguments.ID,
		})
		if err != nil {
			return nil, err
		}
	}
	outputs := []tensor{}
	for _, output := range result.Outputs {
		values, err := pollard.Values[float32](output)
		check(err)
		outputs = append(outputs, tensor{output.Name, output.Datatype, output.Shape, convert[float32, float64](values)})
	}
	return object{"model": result.Model, "version": result.Version, "id": result.ID, "outputs": outputs}, nil
}

func toTensor(input tensor) (pollard.Tensor, error) {
	switch input.Datatype {
	case "UINT8":
		return pollard.NewTensor(input.Name, input.Shape, convert[float64, uint8](input.Data))
	case "FP32":
		return pollard.NewTensor(input.Name, input.Shape, convert[float64, float32](input.Data))
	case "INT64":
		return pollard.NewTensor(input.Name, input.Shape, convert[float64, int64](input.Data))
	}
	return pollard.Tensor{}, fmt.Errorf("this runner knows no datatype %q", input.Datatype)
}

func convert[From, To uint8 | int64 | float32 | float64](values []From) []To {
	converted := make([]To, len(values))
	for index, value := range values {
		converted[index] = To(value)
	}
	return converted
}

func seconds(count float64) time.Duration { return time.Duration(count * float64(time.Second)) }

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
