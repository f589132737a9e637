"""Reading what was recorded: decompositions of the stream, attribution to logits, composition of heads."""
