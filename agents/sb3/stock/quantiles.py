"""QRDQN's policy with a pair of causal LMs as networks; needs sb3-contrib."""

from typing import Any

from sb3_contrib.qrdqn.policies import QRDQNPolicy

from agents.sb3.stock.q_network import TokenQNetwork


class CausalLMQRDQNPolicy(QRDQNPolicy):
    """QRDQN's pair of quantile networks, each a causal LM.

    Args:
        *args: As in `QRDQNPolicy`.
        network: Keywords of `TokenQNetwork`.
        **options: As in `QRDQNPolicy`.
    """

    def __init__(self, *args: Any, network: dict[str, Any], **options: Any) -> None:
        self.network = network
        options["n_quantiles"] = network["n_quantiles"]
        super().__init__(*args, **options)

    def make_quantile_net(self) -> Any:
        """Build one of the two networks."""
        net = TokenQNetwork(self.observation_space, self.action_space, **self.network)
        return net.to(self.device)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "network": self.network}
