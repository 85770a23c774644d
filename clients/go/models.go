package pollard

import (
	"context"
	"strings"

	modelsv1 "github.com/pollard-ai/pollard/clients/go/gen/pollard/models/v1"
)

const pageSize = 200

// Models asks the model management server.
type Models struct {
	*client
	stub modelsv1.ModelServiceClient
}

// NewModels makes a client of a model management server at "HOST:PORT". It connects with the first call.
func NewModels(address string, options ...Option) (*Models, error) {
	made, err := dial(address, options)
	if err != nil {
		return nil, err
	}
	return &Models{made, modelsv1.NewModelServiceClient(made.conn)}, nil
}

// Model is a model of the registry.
type Model struct {
	Name        string
	Description string
	Labels      map[string]string
	// LatestRevision is the number of the newest revision; 0 when there is none.
	LatestRevision int64
	// Aliases are revisions by alias.
	Aliases map[string]int64
}

// List returns all models, by name.
func (m *Models) List(ctx context.Context) ([]Model, error) {
	ctx, cancel := m.bounded(ctx)
	defer cancel()
	var models []Model
	for token := ""; ; {
		page, err := m.stub.ListModels(ctx, &modelsv1.ListModelsRequest{PageSize: pageSize, PageToken: token})
		if err != nil {
			return nil, failure(ctx, err, "/pollard.models.v1.ModelService/ListModels", m.address)
		}
		for _, found := range page.Models {
			model := Model{
				Name:           lastPart(found.Name),
				Description:    found.Description,
				Labels:         found.Labels,
				LatestRevision: found.LatestRevision,
				Aliases:        make(map[string]int64, len(found.Aliases)),
			}
			for _, alias := range found.Aliases {
				model.Aliases[lastPart(alias.Name)] = alias.Revision
			}
			models = append(models, model)
		}
		if token = page.NextPageToken; token == "" {
			return models, nil
		}
	}
}

func lastPart(name string) string { return name[strings.LastIndexByte(name, '/')+1:] }
