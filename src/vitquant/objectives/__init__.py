"""The objectives of searches and the losses of training, as pure functions of tensors."""
