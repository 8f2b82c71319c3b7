"""What every data set is made of: registry, samples, order, loader, packed store."""
