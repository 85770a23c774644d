// Command classify asks a served model about images: classify MODEL IMAGE…
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	pollard "github.com/pollard-ai/pollard/clients/go"
)

func main() {
	if len(os.Args) < 3 {
		fmt.Fprintln(os.Stderr, "usage: classify MODEL IMAGE…")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2:]); err != nil {
		if errors.Is(err, pollard.ErrNotFound) {
			fmt.Fprintln(os.Stderr, "push a model first:", err)
		} else {
			fmt.Fprintln(os.Stderr, err)
		}
		os.Exit(1)
	}
}

func run(model string, images []string) error {
	address := os.Getenv("POLLARD_VISION_ADDRESS")
	if address == "" {
		address = pollard.DefaultVisionAddress
	}
	vision, err := pollard.NewVision(address)
	if err != nil {
		return err
	}
	defer vision.Close()
	for _, image := range images {
		prediction, err := vision.PredictFile(context.Background(), image, model, &pollard.PredictOptions{TopK: 3})
		if err != nil {
			return err
		}
		var best []string
		for _, label := range prediction.Labels {
			best = append(best, fmt.Sprintf("%s %.1f%%", label.Label, 100*label.Score))
		}
		fmt.Printf("%s: %s (revision %d)\n", image, strings.Join(best, ", "), prediction.Revision)
	}
	return nil
}
