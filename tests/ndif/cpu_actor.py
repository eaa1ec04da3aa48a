"""A model actor for machines without a GPU; runs in the server's environment, named by NDIF_DEFAULT_MODEL_ACTOR_CLASS.

NDIF's own actor sets CUDA devices when it loads a model, and synchronises them after each request.
"""

import gc

import ray
from ndif.services.ray.deployments.modeling.base import BaseModelDeployment
from nnsight.modeling.huggingface import HuggingFaceModel


@ray.remote(num_cpus=0.1, max_restarts=-1)  # several models are up at once, one works
class CPUModelActor(BaseModelDeployment):
    """NDIF's model actor, less what needs CUDA."""

    def load_from_disk(self):
        model = HuggingFaceModel.from_model_key(
            self.model_key, dispatch=True, dtype=self.dtype_name, device="cpu", **self.kwargs
        )
        model._module.requires_grad_(False)
        return model

    def cleanup(self):
        self.kill_switch.clear()
        self.kill_reason = None
        self.execution_ident = None
        self.model.interleaver.cancel()
        gc.collect()
