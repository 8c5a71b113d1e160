"""How the partial gradients of the workers become one sum."""
