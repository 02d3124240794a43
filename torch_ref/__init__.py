"""The PyTorch twin: flax_resnet's mirror, file by file, to prove it right."""
