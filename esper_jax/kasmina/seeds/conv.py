"""Seeds that follow a convolution: `conv_small`, `conv_light`, `conv_heavy`, `depthwise`, `bottleneck` and `se`.

Zero at birth. They take `u` of shape `[N, *space, C]` with 1 to 3 spatial dimensions, the layer's own output.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..blueprints import CONVS, register_blueprint
from ..products import product
from ..spec import Site
from ._convolve import convolve
from ._parts import at_least_one, group_norm, he, norm_params

Params = dict[str, Array]
Image = Float[Array, "N *space C"]


def _taps(site: Site, kernel: int) -> tuple[int, ...]:
    return (at_least_one("kernel", kernel),) * site.spatial


def _conv_light_init(key: jax.Array, site: Site, *, kernel: int = 3, groups: int = 8) -> Params:
    width = site.out_features
    at_least_one("groups", groups)
    return {
        "conv": he(key, (*_taps(site, kernel), width, width), site.dtype),
        **norm_params(width, site),
        "up": jnp.zeros((width, width), site.dtype),
    }


def _conv_light(params: Params, u: Image, groups: int) -> Image:
    return product(jax.nn.relu(group_norm(params, convolve(u, params["conv"]), groups)), params["up"])


def _depthwise_init(key: jax.Array, site: Site, *, kernel: int = 3, groups: int = 8) -> Params:
    width = site.out_features
    at_least_one("groups", groups)
    return {
        "conv": he(key, (*_taps(site, kernel), 1, width), site.dtype),
        **norm_params(width, site),
        "up": jnp.zeros((width, width), site.dtype),
    }


def _depthwise(params: Params, u: Image, groups: int) -> Image:
    filtered = convolve(u, params["conv"], groups=u.shape[-1])
    return product(jax.nn.relu(group_norm(params, filtered, groups)), params["up"])


def _bottleneck_init(key: jax.Array, site: Site, *, reduction: int = 4, kernel: int = 3, groups: int = 8) -> Params:
    width = site.out_features
    hidden = max(1, width // at_least_one("reduction", reduction))
    at_least_one("groups", groups)
    first, second = jax.random.split(key)
    return {
        "down": he(first, (width, hidden), site.dtype),
        "conv": he(second, (*_taps(site, kernel), hidden, hidden), site.dtype),
        **norm_params(hidden, site),
        "up": jnp.zeros((hidden, width), site.dtype),
    }


def _bottleneck(params: Params, u: Image, groups: int) -> Image:
    inner = convolve(product(u, params["down"]), params["conv"])
    return product(jax.nn.relu(group_norm(params, inner, groups)), params["up"])


def _se_init(key: jax.Array, site: Site, *, reduction: int = 4) -> Params:
    width = site.out_features
    hidden = max(1, width // at_least_one("reduction", reduction))
    return {
        "squeeze": he(key, (width, hidden), site.dtype),
        "squeeze_bias": jnp.full((hidden,), 0.1, site.dtype),
        "excite": jnp.zeros((hidden, width), site.dtype),
        "excite_bias": jnp.zeros((width,), site.dtype),
    }


def _se(params: Params, u: Image) -> Image:
    mean = jnp.mean(u, axis=tuple(range(1, u.ndim - 1)), keepdims=True)
    hidden = jax.nn.relu(mean @ params["squeeze"] + params["squeeze_bias"])
    return u * jnp.tanh(hidden @ params["excite"] + params["excite_bias"])


def _conv_small_init(key: jax.Array, site: Site, *, groups: int = 8) -> Params:
    width = site.out_features
    at_least_one("groups", groups)
    return {
        "mix": he(key, (width, width), site.dtype),
        **norm_params(width, site),
        "up": jnp.zeros((width, width), site.dtype),
    }


def _conv_small(params: Params, u: Image, groups: int) -> Image:
    return product(jax.nn.relu(group_norm(params, product(u, params["mix"]), groups)), params["up"])


def _conv_heavy_init(key: jax.Array, site: Site, *, kernel: int = 3, groups: int = 8) -> Params:
    width = site.out_features
    first, second = jax.random.split(key)
    at_least_one("groups", groups)
    scale, bias = norm_params(width, site).values()
    return {
        "conv": he(first, (*_taps(site, kernel), width, width), site.dtype),
        "scale": scale,
        "bias": bias,
        "conv2": he(second, (*_taps(site, kernel), width, width), site.dtype),
        "scale2": scale,
        "bias2": bias,
        "up": jnp.zeros((width, width), site.dtype),
    }


def _conv_heavy(params: Params, u: Image, groups: int) -> Image:
    inner = jax.nn.relu(group_norm(params, convolve(u, params["conv"]), groups))
    second = {"scale": params["scale2"], "bias": params["bias2"]}
    return product(jax.nn.relu(group_norm(second, convolve(inner, params["conv2"]), groups)), params["up"])


register_blueprint(
    "conv_small",
    init=_conv_small_init,
    apply=_conv_small,
    kinds=CONVS,
    about="1x1 convolution, group norm, relu and a 1x1 convolution after the layer",
    citation="Lin et al., Network In Network, ICLR 2014",
)
register_blueprint(
    "conv_heavy",
    init=_conv_heavy_init,
    apply=_conv_heavy,
    kinds=CONVS,
    about="two convolutions with group norm and relu, and a 1x1 convolution after the layer",
    citation="He et al., Identity Mappings, ECCV 2016",
)
register_blueprint(
    "conv_light",
    init=_conv_light_init,
    apply=_conv_light,
    kinds=CONVS,
    about="convolution, group norm, relu and a 1x1 convolution after the layer",
    citation="He et al., Identity Mappings, ECCV 2016",
)
register_blueprint(
    "depthwise",
    init=_depthwise_init,
    apply=_depthwise,
    kinds=CONVS,
    about="one filter a channel, group norm, relu and a 1x1 convolution after the layer",
    citation="Howard et al., MobileNets, 2017",
)
register_blueprint(
    "bottleneck",
    init=_bottleneck_init,
    apply=_bottleneck,
    kinds=CONVS,
    about="1x1 down, convolution, group norm, relu, 1x1 up after the layer",
    citation="He et al., Deep Residual Learning, CVPR 2016",
)
register_blueprint(
    "se",
    init=_se_init,
    apply=_se,
    kinds=CONVS,
    about="channels rescaled between 0 and 2 by what the whole image holds (with the blend add)",
    citation="Hu et al., Squeeze-and-Excitation Networks, CVPR 2018",
)
