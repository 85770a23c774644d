"""The model management service: registry, blobs, uploads, switches and the fleet."""
