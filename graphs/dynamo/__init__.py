"""``torch.compile(backend="graphs")``: one recording for each graph of Dynamo's."""
