"""Tables 4 and 6: weights of examples, learned on long-tailed CIFAR-10."""
