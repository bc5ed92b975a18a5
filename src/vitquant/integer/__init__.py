"""The definitions of the integer operations, as pure functions on int64 tensors that every engine here shares."""
