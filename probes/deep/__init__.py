"""What goes on inside a deep model: states by layer, put back, read out, and followed through denoising."""
