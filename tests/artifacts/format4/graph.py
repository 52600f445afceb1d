# The model as generated code, to be read. hatify never runs this file.

def forward(self, x, task = None):
    # (top)
    stem = self.stem(x)
    norm = self.norm(stem, task = task)
    relu = aten.relu.default(norm)
    scale = self.scale
    scale_of_task = self.hat.indexed.scale(scale, task)
    mul = relu * scale_of_task
    mul_masked = self.hat.masks.mul(mul, task)
    head = self.head(mul_masked, task = task)
    return (head,)
