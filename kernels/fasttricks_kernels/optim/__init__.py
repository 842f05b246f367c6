"""SGD on FP32 masters, and the overflow check that goes before a step."""
