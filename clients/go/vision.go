package pollard

import (
	"context"
	"fmt"
	"os"

	preprocessv1 "github.com/pollard-ai/pollard/clients/go/gen/pollard/preprocess/v1"
	visionv1 "github.com/pollard-ai/pollard/clients/go/gen/pollard/vision/v1"
)

// Vision asks a preprocess server about images.
type Vision struct {
	*client
	stub visionv1.VisionServiceClient
}

// NewVision makes a client of a preprocess server at "HOST:PORT". It connects with the first call.
func NewVision(address string, options ...Option) (*Vision, error) {
	made, err := dial(address, options)
	if err != nil {
		return nil, err
	}
	return &Vision{made, visionv1.NewVisionServiceClient(made.conn)}, nil
}

// PredictOptions shape the answer for an image.
type PredictOptions struct {
	Selection
	// TopK is the number of labels; 0 means what the bundle says.
	TopK uint32
	// Embedding asks for the embedding too, where the bundle has one.
	Embedding bool
}

// Label is one class and how likely it is.
type Label struct {
	// Index of the class.
	Index uint32
	// Label is its name; empty when the bundle names no classes.
	Label string
	// Score is 0 to 1 where the bundle says so.
	Score float32
}

// Prediction is the answer for one image.
type Prediction struct {
	Model string
	// Revision is the one that answered.
	Revision int64
	// Labels, best first; empty for models that do not classify.
	Labels []Label
	// Embedding, where it was asked for or is all that the model gives.
	Embedding []float32
	// Response is the whole answer, for detections and masks.
	Response *visionv1.PredictResponse
}

// PredictFile answers for an image file. See Predict.
func (v *Vision) PredictFile(ctx context.Context, path, model string, options *PredictOptions) (*Prediction, error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("pollard: %w", err)
	}
	return v.Predict(ctx, content, model, options)
}

// Predict answers for the bytes of an image file. Without options it is asked of the alias "production".
//
// The error is ErrInvalidArgument when the image is damaged, empty, too large or none at all, and
// ErrNotFound when there is no such model, revision or alias.
func (v *Vision) Predict(ctx context.Context, image []byte, model string, options *PredictOptions) (*Prediction, error) {
	if options == nil {
		options = &PredictOptions{}
	}
	if err := options.check(model); err != nil {
		return nil, err
	}
	selector := &preprocessv1.ModelSelector{Model: model, StickyKey: options.StickyKey}
	if options.Revision != 0 {
		selector.Choice = &preprocessv1.ModelSelector_Revision{Revision: options.Revision}
	} else if options.Alias != "" {
		selector.Choice = &preprocessv1.ModelSelector_Alias{Alias: options.Alias}
	}
	ctx, cancel := v.bounded(ctx)
	defer cancel()
	response, err := v.stub.Predict(ctx, &visionv1.PredictRequest{
		Model:   selector,
		Image:   &preprocessv1.Image{Source: &preprocessv1.Image_Content{Content: image}},
		Options: &visionv1.PredictOptions{TopK: options.TopK, Embedding: options.Embedding},
	})
	if err != nil {
		return nil, failure(ctx, err, "/pollard.vision.v1.VisionService/Predict", v.address)
	}
	prediction := &Prediction{Model: response.Model, Revision: response.Revision, Response: response}
	for _, label := range response.GetClassification().GetLabels() {
		prediction.Labels = append(prediction.Labels, Label{label.Index, label.Label, label.Score})
	}
	prediction.Embedding = response.GetClassification().GetEmbedding().GetValues()
	if prediction.Embedding == nil {
		prediction.Embedding = response.GetEmbedding().GetValues()
	}
	return prediction, nil
}
