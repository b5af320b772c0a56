"""Define the torch operator: schema, the one autograd.Function, transforms, the short way. It names no backend."""
