"""Images in, tensors and answers out: `PreprocessService` and `VisionService`."""
