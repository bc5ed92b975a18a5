"""What a search maximizes or a training minimizes: pure functions of tensors."""
