"""equipoise: align one language model to several objectives and choose the trade-off afterwards."""
