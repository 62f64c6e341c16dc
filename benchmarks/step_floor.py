"""The floor of a training step, a time that no step can beat: its matrix products by the fastest kernels, and its optimizer.

For the recurrent network, the floor takes the fastest of these: oneDNN's kernel, PyTorch's native kernel, and the matrix
products of the network alone, which either multiply inputs and states apart or join them for one product. The other products
are those of the projection to the vocabulary and, with a synthesizer, those of its prediction and its training. The
optimizer is one step of the fused Adam, which reads and writes all parameters, gradients and moments once. Softmax,
embedding, dropout, clipping and Python are left out.

Legend: T = window length, B = lanes, E = input size, H = hidden units, G = gates of all units, 4 H or 3 H.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from step_ways import Setting, Step, model_of, our_trainer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dni_seq.models.lstm_kernels import run_rnn

TRIALS = 7
"""Number of measurements of each kernel. A kernel's time is that of its fastest measurement."""


class Product(NamedTuple):
    """A product of two matrices, [rows, inner] times [inner, columns]. `crossed` says which operands are transposed."""

    rows: int
    inner: int
    columns: int
    crossed: tuple[bool, bool] = (False, False)

    @property
    def operations(self) -> int:
        """Number of multiplications and additions."""
        return 2 * self.rows * self.inner * self.columns

    def __str__(self) -> str:
        return f"{self.rows} x {self.inner} x {self.columns}"


Products = Counter[Product]
"""The number of times that each product runs."""


def through_weight(rows: int, inner: int, columns: int, *, forward: int = 1, back: int = 1, weights: int = 1) -> Products:
    """Returns the products of a linear layer with weights [columns, inner] on `rows` rows.

    Args:
        rows: number of rows of the input.
        inner: width of the input.
        columns: width of the output.
        forward: number of products that compute the output.
        back: number of products that compute the gradient of the input.
        weights: number of products that compute the gradient of the weights.
    """
    times = {
        Product(rows, inner, columns, (False, True)): forward,
        Product(rows, columns, inner): back,
        Product(columns, rows, inner, (True, False)): weights,
    }
    return +Counter(times)  # without products that run 0 times


def rnn_products(setting: Setting, bptt: int) -> dict[str, Products]:
    """Returns the products of the recurrent network in one window, forward and backward, for each arrangement.

    "products, apart" multiplies inputs and states separately. "products, joined", for an LSTM only, joins them.
    """
    gates = {"lstm": 4, "gru": 3}[setting.cell] * setting.hidden
    apart, joined = Products(), Products()
    for size in [setting.embed] + [setting.hidden] * (setting.layers - 1):
        apart += through_weight(bptt * setting.lanes, size, gates)
        # The gradient of the window's first state is not needed. One product over all steps is the gradient of the weights.
        apart += through_weight(setting.lanes, setting.hidden, gates, forward=bptt, back=bptt - 1, weights=0)
        apart += through_weight(bptt * setting.lanes, setting.hidden, gates, forward=0, back=0)
        joined += through_weight(setting.lanes, size + setting.hidden, gates, forward=bptt, back=bptt, weights=0)
        joined += through_weight(bptt * setting.lanes, size + setting.hidden, gates, forward=0, back=0)
    found = {"products, apart": apart}
    if setting.cell == "lstm":  # a GRU multiplies the state's product by a gate before it adds the input's product
        found["products, joined"] = joined
    return found


def vocabulary_products(setting: Setting, bptt: int) -> Products:
    """Returns the products of the projection to the vocabulary."""
    return through_weight(bptt * setting.lanes, setting.hidden, setting.vocabulary)


class RecordedProducts(TorchDispatchMode):
    """Records the matrix products that run inside the context.

    Attributes:
        products: the number of times that each product ran.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products: Products = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation, and counts it if it is a matrix product."""
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            left, right = args[-2:]
            crossed = (left.stride(0) < left.stride(1), right.stride(0) < right.stride(1))
            self.products[Product(*left.shape, right.shape[1], crossed)] += 1
        return func(*args, **(kwargs or {}))


def synthesizer_products(setting: Setting, bptt: int, options: Mapping[str, Any]) -> tuple[nn.Module, Products]:
    """Returns a synthesizer, and the products that run when it predicts and trains once at the state after a window."""
    trainer, tokens, lookahead = our_trainer(setting, bptt, options)
    trainer.step(tokens, tokens, lookahead=lookahead)  # tells the synthesizer the window's length
    assert trainer.credit is not None
    synthesizer: Any = trainer.credit.synthesizer
    with RecordedProducts() as record:
        synthesizer.predict_and_train(trainer.model.initial_state(setting.lanes), lookahead)
    return synthesizer, record.products


def kernels_of(product: Product) -> dict[str, Step]:
    """Returns functions that run a product, by name. They differ in the kernel and in how the operands lie in memory."""
    left = _operand(product.rows, product.inner, product.crossed[0])
    right = _operand(product.inner, product.columns, product.crossed[1])
    out, across = torch.empty(product.rows, product.columns), torch.empty(product.columns, product.rows)
    rows, columns, weight = left.contiguous(), right.contiguous(), right.t().contiguous()
    found: dict[str, Step] = {
        "mm": partial(torch.mm, left, right, out=out),
        "mm, by rows": partial(torch.mm, rows, columns, out=out),
        "mm, transposed": partial(torch.mm, right.t(), left.t(), out=across),
    }
    if torch.backends.mkldnn.is_available():
        found["oneDNN"] = partial(torch.ops.mkldnn._linear_pointwise, rows, weight, None, "none", [], "")
    return found


def _operand(rows: int, columns: int, crossed: bool) -> Tensor:
    return torch.rand(columns, rows).t() if crossed else torch.rand(rows, columns)


def fastest(steps: Mapping[str, Step]) -> str:
    """Runs functions in turns and returns the name of the one that needs the least CPU time."""
    best = dict.fromkeys(steps, float("inf"))
    for trial in range(TRIALS + 1):
        for name, step in steps.items():
            begin = time.process_time()
            step()
            if trial:  # the first run, which allocates memory, does not count
                best[name] = min(best[name], time.process_time() - begin)
    return min(best, key=lambda name: best[name])


def whole_rnn(setting: Setting, bptt: int, native: int) -> Step:
    """Returns a function that runs the recurrent network forward and backward, by the native kernel if T <= `native`."""
    kind: Callable[..., nn.Module] = {"lstm": nn.LSTM, "gru": nn.GRU}[setting.cell]
    rnn = kind(setting.embed, setting.hidden, setting.layers)
    inputs = torch.rand(bptt, setting.lanes, setting.embed, requires_grad=True)
    state: Any = torch.zeros(setting.layers, setting.lanes, setting.hidden)
    state = (state, state.clone()) if setting.cell == "lstm" else state
    gradient = torch.rand(bptt, setting.lanes, setting.hidden)

    def step() -> None:
        outputs, _ = run_rnn(rnn, inputs, state, native)
        torch.autograd.grad(outputs, [inputs, *rnn.parameters()], gradient)

    return step


class Floor:
    """The floor of a step for one setting, T and synthesizer. A call runs the floor once.

    Args:
        setting: the model and its lanes.
        bptt: T.
        options: options of the synthesizer, as for `our_trainer`; None for the floor without a synthesizer.

    Attributes:
        kernels: the kernel chosen for the recurrent network and for each product.
    """

    def __init__(self, setting: Setting, bptt: int, options: Mapping[str, Any] | None = None) -> None:
        self._names: dict[Product, str] = {}
        self._chosen: dict[Product, Step] = {}
        rnn, products, self._steps = self._rnn(setting, bptt)
        products = products + vocabulary_products(setting, bptt)
        modules: list[nn.Module] = [model_of(setting)]
        if options is not None:
            synthesizer, more = synthesizer_products(setting, bptt, options)
            products = products + more
            modules.append(synthesizer)
        self._steps += [*self._by_kernel(products), optimizer_pass(modules)]
        self.kernels = {"rnn": rnn, **{str(product): self._names[product] for product in products}}

    def __call__(self) -> None:
        """Runs all products and the optimizer once."""
        for step in self._steps:
            step()

    def _rnn(self, setting: Setting, bptt: int) -> tuple[str, Products, list[Step]]:
        """Returns the fastest way to run the recurrent network: its name, its products, and a list of functions.

        A way of matrix products has no functions; a way of a whole kernel has no products and one function.
        """
        products = rnn_products(setting, bptt)
        whole = {"native kernel": whole_rnn(setting, bptt, native=bptt)}
        if setting.cell == "lstm" and torch.backends.mkldnn.is_available():
            whole["oneDNN's kernel"] = whole_rnn(setting, bptt, native=0)
        ways = {name: partial(_run, list(self._by_kernel(each))) for name, each in products.items()}
        name = fastest(ways | whole)
        return name, products.get(name, Products()), [whole[name]] if name in whole else []

    def _by_kernel(self, products: Products) -> Iterator[Step]:
        """Yields a function for each run of each product, by the fastest kernel for this product."""
        for product, times in products.items():
            if product not in self._chosen:
                kernels = kernels_of(product)
                self._names[product] = fastest(kernels)
                self._chosen[product] = kernels[self._names[product]]
            yield from [self._chosen[product]] * times


def _run(steps: list[Step]) -> None:
    for step in steps:
        step()


def optimizer_pass(modules: list[nn.Module]) -> Step:
    """Returns a function that makes one step of the fused Adam on all parameters of the modules, with random gradients."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    for parameter in parameters:
        parameter.grad = torch.rand_like(parameter)
    return torch.optim.Adam(parameters, lr=1e-3, fused=True).step
