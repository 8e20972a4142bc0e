"""What the services whose input is one image have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from provider_image.images.resizing import load_image
from provider_image.service import IMAGE_INPUT, Input

if TYPE_CHECKING:
    from provider_image.backends import Device, Net
    from provider_image.models.artefact import Artefact


class OneImage:
    """The input, loading and preparing of such a service; see `provider_image.service.Service`."""

    inputs: Mapping[str, Input] = {"image": IMAGE_INPUT}

    def load(self, artefact: Artefact, device: Device) -> Net:
        """Load the artefact's graph."""
        from provider_image.backends import load_net

        return load_net(artefact, device)

    def prepare(
        self, artefact: Artefact, inputs: Mapping[str, bytes], params: Mapping[str, Any], *, is_resized: bool = False
    ) -> Any:
        """Decode the image to the model's input size."""
        return load_image(inputs["image"], artefact, is_resized=is_resized)
