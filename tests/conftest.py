"""What every test starts from."""

import torch

# See CachedModel.__init__: the first cosine of a process must not be computed by several threads at once.
torch.ones(1).cos()
