"""A model actor for machines without a GPU; runs in the server's environment, named by NDIF_DEFAULT_MODEL_ACTOR_CLASS.

1. NDIF's own actor sets CUDA devices when it loads a model, and synchronises them after each request.
2. Requests that are not trusted run in a process of their own, as NDIF's sandbox has it; that process is made when the
   first such request comes.
"""

import gc

import ray
from ndif.services.ray.sandbox.model import SandboxModelDeployment
from nnsight.modeling.huggingface import HuggingFaceModel


@ray.remote(num_cpus=0.1, max_restarts=-1)  # several models are up at once, one works
class CPUModelActor(SandboxModelDeployment):
    """NDIF's model actor, less what needs CUDA."""

    def open_pool(self, pool_size=None, peers=1):
        self.pool, self.execution_sandbox = None, None

    def run_in_runner(self, request, seed):
        if self.pool is None:
            super().open_pool(1)
        return super().run_in_runner(request, seed)

    def load_from_disk(self):
        model = HuggingFaceModel.from_model_key(
            self.model_key, dispatch=True, dtype=self.dtype_name, device="cpu", **self.kwargs
        )
        model._module.requires_grad_(False)
        return model

    def cleanup(self):
        self.discard_sandbox()
        self.kill_switch.clear()
        self.kill_reason = None
        self.execution_ident = None
        self.model.interleaver.cancel()
        gc.collect()
