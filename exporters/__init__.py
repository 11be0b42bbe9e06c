"""A compacted model in, one artifact out: GGUF here, ONNX beside it; quantization lives in this room."""
