from pathlib import Path
import torch
torch.ops.load_library(str(Path(__file__).parent / "libsnv2_torch.so"))
