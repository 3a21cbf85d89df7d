"""The Triton kernels behind `kernels_spidr`, which says what each computes, checks arguments and launches them.

Only imported where Triton is installed and a kernel is about to run. Shapes of blocks are fixed, never found by
timing: another block is another order of summation, and a resumed run must repeat the uninterrupted one bit for bit.
Lengths are no compile-time constants, so that no length costs a compilation. Row offsets are 64-bit: the extractor's
first activation has 760 000 x 512 elements per 3.8 M samples, and batches may be larger.
"""

try:  # in a `try`, because transformers demands every other import of remote code
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The kernels need Triton: `pip install triton`.") from error

_LENGTHS = ("rows", "length", "frames", "samples", "rows_per_program")


@triton.jit
def _normalize(x, inside, channels, eps):
    """Rows of `x` (float32, zero outside) without mean and with unit variance, and one over the deviation."""
    mean = tl.sum(x, axis=1) / channels
    centred = tl.where(inside, x - mean[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / channels + eps)
    return centred * inverse[:, None], inverse


@triton.jit
def _norm_gradient(grad_normed, normed, inverse, channels):
    """Gradient of what `_normalize` takes, from that of the rows it returns."""
    mean = tl.sum(grad_normed, axis=1) / channels
    along = tl.sum(grad_normed * normed, axis=1) / channels
    return (grad_normed - mean[:, None] - normed * along[:, None]) * inverse[:, None]


@triton.jit
def _normal_cdf(y, bell):
    """The normal distribution's cumulative function, within 3e-7; `bell`: exp(-y * y / 2), which slopes need as well.

    By Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: fewer instructions than `tl.erf`, and these
    kernels wait for instructions, not for memory.
    """
    t = 1.0 / (1.0 + 0.2316418882 * tl.abs(y))
    series = 0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145)))
    tail = bell * t * series
    return tl.where(y > 0.0, 1.0 - tail, tail)


@triton.jit
def _gelu(y):
    """Exact GELU."""
    return y * _normal_cdf(y, tl.exp(-0.5 * y * y))


@triton.jit
def _gelu_slope(y):
    """d/dy of `_gelu`."""
    bell = tl.exp(-0.5 * y * y)
    return _normal_cdf(y, bell) + y * 0.3989422804014327 * bell


@triton.jit(do_not_specialize=_LENGTHS)
def norm_gelu_forward(
    x,
    weight,
    bias,
    out,
    rows,
    channels: tl.constexpr,
    eps: tl.constexpr,
    affine: tl.constexpr,
    block_rows: tl.constexpr,
    block_channels: tl.constexpr,
):
    """One block of whole rows: statistics, affine map and exact GELU without leaving the registers."""
    row = tl.program_id(0).to(tl.int64) * block_rows + tl.arange(0, block_rows)
    column = tl.arange(0, block_channels)
    in_row = column < channels
    inside = (row < rows)[:, None] & in_row[None, :]
    offsets = row[:, None] * channels + column[None, :]
    y, _ = _normalize(tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32), inside, channels, eps)
    if affine:
        scale = tl.load(weight + column, mask=in_row, other=0.0).to(tl.float32)
        shift = tl.load(bias + column, mask=in_row, other=0.0).to(tl.float32)
        y = y * scale[None, :] + shift[None, :]
    tl.store(out + offsets, _gelu(y).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_LENGTHS)
def norm_gelu_backward(
    grad,
    x,
    weight,
    bias,
    grad_x,
    grad_weight,
    grad_bias,
    rows,
    rows_per_program,
    channels: tl.constexpr,
    eps: tl.constexpr,
    affine: tl.constexpr,
    block_rows: tl.constexpr,
    block_channels: tl.constexpr,
):
    """Gradients of `rows_per_program` rows; those of weight and bias as one partial sum per program (P x C).

    The statistics are computed again: the row is here anyway, so that the forward pass has nothing to keep but `x`.
    """
    program = tl.program_id(0)
    first = program.to(tl.int64) * rows_per_program
    column = tl.arange(0, block_channels)
    in_row = column < channels
    scale = tl.full((block_channels,), 1.0, tl.float32)
    shift = tl.zeros((block_channels,), tl.float32)
    if affine:
        scale = tl.load(weight + column, mask=in_row, other=0.0).to(tl.float32)
        shift = tl.load(bias + column, mask=in_row, other=0.0).to(tl.float32)
    weight_sum = tl.zeros((block_channels,), tl.float32)
    bias_sum = tl.zeros((block_channels,), tl.float32)
    for start in range(0, rows_per_program, block_rows):
        index = start + tl.arange(0, block_rows)
        row = first + index
        inside = ((index < rows_per_program) & (row < rows))[:, None] & in_row[None, :]
        offsets = row[:, None] * channels + column[None, :]
        normed, inverse = _normalize(tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32), inside, channels, eps)
        y = normed * scale[None, :] + shift[None, :]
        grad_y = tl.load(grad + offsets, mask=inside, other=0.0).to(tl.float32) * _gelu_slope(y)
        if affine:
            weight_sum += tl.sum(grad_y * normed, axis=0)
            bias_sum += tl.sum(grad_y, axis=0)
        grad_rows = _norm_gradient(grad_y * scale[None, :], normed, inverse, channels)
        tl.store(grad_x + offsets, grad_rows.to(grad_x.dtype.element_ty), mask=inside)
    if affine:
        tl.store(grad_weight + program.to(tl.int64) * channels + column, weight_sum, mask=in_row)
        tl.store(grad_bias + program.to(tl.int64) * channels + column, bias_sum, mask=in_row)


@triton.jit
def _convolved(
    x,
    weight,
    row,
    inside_rows,
    column,
    in_row,
    samples,
    kernel: tl.constexpr,
    stride: tl.constexpr,
    dtype: tl.constexpr,
    precision: tl.constexpr,
    widen: tl.constexpr,
    by_hand: tl.constexpr,
):
    """Windows of `row` in `dtype` (rows x 16, zeros from `kernel` on), and their product with the taps (float32).

    `by_hand`: without `tl.dot`.
    """
    tap = tl.arange(0, 16)
    place = row[:, None] * stride + tap[None, :]
    there = inside_rows[:, None] & (tap < kernel)[None, :] & (place < samples)
    windows = tl.load(x + place, mask=there, other=0.0).to(dtype)
    if widen:
        windows = windows.to(tl.float32)
    if by_hand:
        sums = tl.zeros((row.shape[0], column.shape[0]), tl.float32)
        for number in tl.static_range(kernel):
            there = inside_rows & (row * stride + number < samples)
            sample = tl.load(x + row * stride + number, mask=there, other=0.0).to(dtype).to(tl.float32)
            factor = tl.load(weight + column * kernel + number, mask=in_row, other=0.0).to(dtype).to(tl.float32)
            sums += sample[:, None] * factor[None, :]
        return windows, sums
    mask = (tap < kernel)[:, None] & in_row[None, :]
    taps = tl.load(weight + column[None, :] * kernel + tap[:, None], mask=mask, other=0.0).to(dtype)
    if widen:
        taps = taps.to(tl.float32)
    return windows, tl.dot(windows, taps, input_precision=precision)


@triton.jit(do_not_specialize=_LENGTHS)
def conv_norm_gelu_forward(
    x,
    weight,
    gain,
    shift,
    out,
    samples,
    rows,
    rows_per_program,
    channels: tl.constexpr,
    kernel: tl.constexpr,
    stride: tl.constexpr,
    eps: tl.constexpr,
    precision: tl.constexpr,
    widen: tl.constexpr,
    block_rows: tl.constexpr,
    block_channels: tl.constexpr,
):
    """Convolution of one channel of samples, norm over the outputs' channels and exact GELU of some rows."""
    first = tl.program_id(0).to(tl.int64) * rows_per_program
    column = tl.arange(0, block_channels)
    in_row = column < channels
    scale = tl.load(gain + column, mask=in_row, other=0.0).to(tl.float32)
    offset = tl.load(shift + column, mask=in_row, other=0.0).to(tl.float32)
    dtype: tl.constexpr = out.dtype.element_ty
    for start in range(0, rows_per_program, block_rows):
        index = start + tl.arange(0, block_rows)
        row = first + index
        inside_rows = (index < rows_per_program) & (row < rows)
        inside = inside_rows[:, None] & in_row[None, :]
        _, y = _convolved(
            x, weight, row, inside_rows, column, in_row, samples, kernel, stride, dtype, precision, widen, False
        )
        normed, _ = _normalize(y, inside, channels, eps)
        y = _gelu(normed * scale[None, :] + offset[None, :])
        tl.store(out + row[:, None] * channels + column[None, :], y.to(dtype), mask=inside)


@triton.jit(do_not_specialize=_LENGTHS)
def conv_norm_gelu_backward(
    grad,
    x,
    weight,
    gain,
    shift,
    grad_taps,
    grad_gain,
    grad_shift,
    samples,
    rows,
    rows_per_program,
    channels: tl.constexpr,
    kernel: tl.constexpr,
    stride: tl.constexpr,
    eps: tl.constexpr,
    precision: tl.constexpr,
    widen: tl.constexpr,
    by_hand: tl.constexpr,
    block_rows: tl.constexpr,
    block_channels: tl.constexpr,
):
    """Gradients of the parameters over `rows_per_program` rows, whose outputs are computed again: a partial sum per
    program, of the taps P x C x kernel, of the norm's P x C."""
    program = tl.program_id(0).to(tl.int64)
    first = program * rows_per_program
    column = tl.arange(0, block_channels)
    in_row = column < channels
    scale = tl.load(gain + column, mask=in_row, other=0.0).to(tl.float32)
    offset = tl.load(shift + column, mask=in_row, other=0.0).to(tl.float32)
    gain_sum = tl.zeros((block_channels,), tl.float32)
    shift_sum = tl.zeros((block_channels,), tl.float32)
    taps_sum = tl.zeros((block_channels, 16), tl.float32)
    dtype: tl.constexpr = grad.dtype.element_ty
    for start in range(0, rows_per_program, block_rows):
        index = start + tl.arange(0, block_rows)
        row = first + index
        inside_rows = (index < rows_per_program) & (row < rows)
        inside = inside_rows[:, None] & in_row[None, :]
        windows, y = _convolved(
            x, weight, row, inside_rows, column, in_row, samples, kernel, stride, dtype, precision, widen, by_hand
        )
        normed, inverse = _normalize(y, inside, channels, eps)
        grad_y = tl.load(grad + row[:, None] * channels + column[None, :], mask=inside, other=0.0).to(tl.float32)
        grad_y *= _gelu_slope(normed * scale[None, :] + offset[None, :])
        gain_sum += tl.sum(grad_y * normed, axis=0)
        shift_sum += tl.sum(grad_y, axis=0)
        grad_rows = _norm_gradient(grad_y * scale[None, :], normed, inverse, channels)
        outputs = tl.where(inside, grad_rows, 0.0).to(dtype)
        if widen:
            outputs = outputs.to(tl.float32)
        taps_sum = tl.dot(tl.trans(outputs), windows, taps_sum, input_precision=precision)
    tap = tl.arange(0, 16)
    places = (program * channels + column)[:, None] * kernel + tap[None, :]
    tl.store(grad_taps + places, taps_sum, mask=in_row[:, None] & (tap < kernel)[None, :])
    tl.store(grad_gain + program * channels + column, gain_sum, mask=in_row)
    tl.store(grad_shift + program * channels + column, shift_sum, mask=in_row)


@triton.jit
def _dropped(x, seed, row, p: tl.constexpr, block_rows: tl.constexpr, block_channels: tl.constexpr):
    """`x` with a share `p` of its elements zeroed and the others scaled: the same ones for the same seed and rows."""
    quarter = tl.arange(0, block_channels // 4)
    places = row.to(tl.int32)[:, None] * (block_channels // 4) + quarter[None, :]
    # One number of four is as dear as all four.
    a, b, c, d = tl.rand4x(tl.load(seed), places)
    numbers = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), (block_rows, block_channels))
    return tl.where(numbers >= p, x * (1.0 / (1.0 - p)), 0.0)


@triton.jit(do_not_specialize=_LENGTHS)
def residual_norm_forward(
    residual,
    branch,
    weight,
    bias,
    seed,
    branch_bias,
    out,
    copy,
    rows,
    channels: tl.constexpr,
    eps: tl.constexpr,
    p: tl.constexpr,
    copies: tl.constexpr,
    has_bias: tl.constexpr,
    block_rows: tl.constexpr,
    block_channels: tl.constexpr,
):
    """Norm of `residual + dropout(branch + branch_bias)`, in the dtypes of residual and branch."""
    row = tl.program_id(0).to(tl.int64) * block_rows + tl.arange(0, block_rows)
    column = tl.arange(0, block_channels)
    in_row = column < channels
    inside = (row < rows)[:, None] & in_row[None, :]
    offsets = row[:, None] * channels + column[None, :]
    added = tl.load(branch + offsets, mask=inside, other=0.0).to(tl.float32)
    if has_bias:
        added += tl.load(branch_bias + column, mask=in_row, other=0.0).to(tl.float32)[None, :]
    if p > 0:
        added = _dropped(added, seed, row, p, block_rows, block_channels)
    x = tl.load(residual + offsets, mask=inside, other=0.0).to(tl.float32) + added
    y, _ = _normalize(x, inside, channels, eps)
    scale = tl.load(weight + column, mask=in_row, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=in_row, other=0.0).to(tl.float32)
    y = y * scale[None, :] + shift[None, :]
    tl.store(out + offsets, y.to(out.dtype.element_ty), mask=inside)
    if copies:
        tl.store(copy + offsets, y.to(copy.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_LENGTHS)
def residual_norm_backward(
    grad,
    grad_copy,
    residual,
    branch,
    weight,
    seed,
    branch_bias,
    grad_residual,
    grad_branch,
    grad_weight,
    grad_bias,
    grad_branch_bias,
    rows,
    rows_per_program,
    channels: tl.constexpr,
    eps: tl.constexpr,
    p: tl.constexpr,
    has_grad: tl.constexpr,
    has_grad_copy: tl.constexpr,
    has_bias: tl.constexpr,
    block_rows: tl.constexpr,
    block_channels: tl.constexpr,
):
    """Gradients of `rows_per_program` rows; those of weight and bias as one partial sum per program (P x C).

    Sum, statistics and dropout are computed again.
    """
    program = tl.program_id(0)
    first = program.to(tl.int64) * rows_per_program
    column = tl.arange(0, block_channels)
    in_row = column < channels
    scale = tl.load(weight + column, mask=in_row, other=0.0).to(tl.float32)
    weight_sum = tl.zeros((block_channels,), tl.float32)
    bias_sum = tl.zeros((block_channels,), tl.float32)
    branch_sum = tl.zeros((block_channels,), tl.float32)
    branch_shift = tl.zeros((block_channels,), tl.float32)
    if has_bias:
        branch_shift = tl.load(branch_bias + column, mask=in_row, other=0.0).to(tl.float32)
    for start in range(0, rows_per_program, block_rows):
        index = start + tl.arange(0, block_rows)
        row = first + index
        inside = ((index < rows_per_program) & (row < rows))[:, None] & in_row[None, :]
        offsets = row[:, None] * channels + column[None, :]
        added = tl.load(branch + offsets, mask=inside, other=0.0).to(tl.float32)
        if has_bias:
            added += branch_shift[None, :]
        if p > 0:
            added = _dropped(added, seed, row, p, block_rows, block_channels)
        x = tl.load(residual + offsets, mask=inside, other=0.0).to(tl.float32) + added
        normed, inverse = _normalize(x, inside, channels, eps)
        grad_y = tl.zeros((block_rows, block_channels), tl.float32)
        if has_grad:
            grad_y += tl.load(grad + offsets, mask=inside, other=0.0).to(tl.float32)
        if has_grad_copy:
            grad_y += tl.load(grad_copy + offsets, mask=inside, other=0.0).to(tl.float32)
        weight_sum += tl.sum(grad_y * normed, axis=0)
        bias_sum += tl.sum(grad_y, axis=0)
        grad_x = _norm_gradient(grad_y * scale[None, :], normed, inverse, channels)
        tl.store(grad_residual + offsets, grad_x.to(grad_residual.dtype.element_ty), mask=inside)
        if p > 0:
            grad_x = _dropped(grad_x, seed, row, p, block_rows, block_channels)
        if has_bias:
            branch_sum += tl.sum(grad_x, axis=0)
        tl.store(grad_branch + offsets, grad_x.to(grad_branch.dtype.element_ty), mask=inside)
    tl.store(grad_weight + program.to(tl.int64) * channels + column, weight_sum, mask=in_row)
    tl.store(grad_bias + program.to(tl.int64) * channels + column, bias_sum, mask=in_row)
    if has_bias:
        tl.store(grad_branch_bias + program.to(tl.int64) * channels + column, branch_sum, mask=in_row)


@triton.jit(do_not_specialize=_LENGTHS)
def bias_gelu_forward(
    x, bias, out, rows, channels: tl.constexpr, block_rows: tl.constexpr, block_channels: tl.constexpr
):
    """Exact GELU of `x + bias`."""
    row = tl.program_id(0).to(tl.int64) * block_rows + tl.arange(0, block_rows)
    column = tl.program_id(1) * block_channels + tl.arange(0, block_channels)
    in_row = column < channels
    inside = (row < rows)[:, None] & in_row[None, :]
    offsets = row[:, None] * channels + column[None, :]
    shift = tl.load(bias + column, mask=in_row, other=0.0).to(tl.float32)
    y = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32) + shift[None, :]
    tl.store(out + offsets, _gelu(y).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_LENGTHS)
def bias_gelu_backward(
    grad,
    x,
    bias,
    grad_x,
    grad_bias,
    rows,
    rows_per_program,
    channels: tl.constexpr,
    block_rows: tl.constexpr,
    block_channels: tl.constexpr,
):
    """Gradients of some columns of `rows_per_program` rows, and their sum (a row of P x C), for the bias."""
    first = tl.program_id(0).to(tl.int64) * rows_per_program
    column = tl.program_id(1) * block_channels + tl.arange(0, block_channels)
    in_row = column < channels
    shift = tl.load(bias + column, mask=in_row, other=0.0).to(tl.float32)
    total = tl.zeros((block_channels,), tl.float32)
    for start in range(0, rows_per_program, block_rows):
        index = start + tl.arange(0, block_rows)
        row = first + index
        inside = ((index < rows_per_program) & (row < rows))[:, None] & in_row[None, :]
        offsets = row[:, None] * channels + column[None, :]
        y = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32) + shift[None, :]
        grad_y = tl.load(grad + offsets, mask=inside, other=0.0).to(tl.float32) * _gelu_slope(y)
        total += tl.sum(grad_y, axis=0)
        tl.store(grad_x + offsets, grad_y.to(grad_x.dtype.element_ty), mask=inside)
    tl.store(grad_bias + tl.program_id(0).to(tl.int64) * channels + column, total, mask=in_row)


@triton.jit(do_not_specialize=_LENGTHS)
def grouped_conv(
    x,
    taps,
    bias,
    out,
    rows,
    length,
    kernel: tl.constexpr,
    before: tl.constexpr,
    groups: tl.constexpr,
    width: tl.constexpr,
    has_bias: tl.constexpr,
    precision: tl.constexpr,
    widen: tl.constexpr,
    block_rows: tl.constexpr,
    block_width: tl.constexpr,
):
    """One group's `width` outputs of a block of frames: `kernel` small matrix products into one accumulator.

    `x` is (B * T) x (groups * width), `taps` groups x kernel x width in x width out. Frame `t` sees the frames
    `t - before` ... `t - before + kernel - 1` of its own utterance, zero where there is none. `widen`: the products
    are of float32 (Triton's interpreter multiplies the bits of bfloat16 numbers).
    """
    group = tl.program_id(1)
    first = tl.program_id(0).to(tl.int64) * block_rows
    row = first + tl.arange(0, block_rows)
    # One 64-bit division for the block, and for its rows those of 32 bits, which take a fraction of the time.
    frame = ((first % length).to(tl.int32) + tl.arange(0, block_rows)) % length
    channel = tl.arange(0, block_width)
    in_group = channel < width
    channels: tl.constexpr = groups * width
    columns = group * width + channel
    weights = taps + group * (kernel * width * width) + channel[:, None] * width + channel[None, :]
    square = in_group[:, None] & in_group[None, :]
    total = tl.zeros((block_rows, block_width), tl.float32)
    for tap in range(kernel):
        shift = tap - before
        there = (row < rows) & (frame + shift >= 0) & (frame + shift < length)
        inputs = tl.load(
            x + (row + shift)[:, None] * channels + columns[None, :], mask=there[:, None] & in_group[None, :], other=0.0
        )
        tap_weights = tl.load(weights + tap * (width * width), mask=square, other=0.0)
        if widen:
            inputs, tap_weights = inputs.to(tl.float32), tap_weights.to(tl.float32)
        total = tl.dot(inputs, tap_weights, total, input_precision=precision)
    if has_bias:
        total += tl.load(bias + columns, mask=in_group, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out + row[:, None] * channels + columns[None, :],
        total.to(out.dtype.element_ty),
        mask=(row < rows)[:, None] & in_group[None, :],
    )


@triton.jit(do_not_specialize=_LENGTHS)
def grouped_conv_weight(
    x,
    grad,
    grad_taps,
    rows,
    length,
    rows_per_program,
    kernel: tl.constexpr,
    before: tl.constexpr,
    groups: tl.constexpr,
    width: tl.constexpr,
    precision: tl.constexpr,
    widen: tl.constexpr,
    block_rows: tl.constexpr,
    block_width: tl.constexpr,
):
    """Gradient of one tap of one group over `rows_per_program` frames: splits x groups x kernel x in x out."""
    tap = tl.program_id(0)
    group = tl.program_id(1)
    split = tl.program_id(2)
    first = split.to(tl.int64) * rows_per_program
    channel = tl.arange(0, block_width)
    in_group = channel < width
    channels: tl.constexpr = groups * width
    columns = group * width + channel
    shift = tap - before
    first_frame = (first % length).to(tl.int32)
    total = tl.zeros((block_width, block_width), tl.float32)
    for start in range(0, rows_per_program, block_rows):
        index = start + tl.arange(0, block_rows)
        row = first + index
        inside = (index < rows_per_program) & (row < rows)
        frame = (first_frame + index) % length + shift
        there = inside & (frame >= 0) & (frame < length)
        inputs = tl.load(
            x + (row + shift)[None, :] * channels + columns[:, None], mask=in_group[:, None] & there[None, :], other=0.0
        )
        outputs = tl.load(
            grad + row[:, None] * channels + columns[None, :], mask=inside[:, None] & in_group[None, :], other=0.0
        )
        if widen:
            inputs, outputs = inputs.to(tl.float32), outputs.to(tl.float32)
        total = tl.dot(inputs, outputs, total, input_precision=precision)
    place = ((split.to(tl.int64) * groups + group) * kernel + tap) * (width * width)
    tl.store(
        grad_taps + place + channel[:, None] * width + channel[None, :],
        total,
        mask=in_group[:, None] & in_group[None, :],
    )


@triton.jit(do_not_specialize=_LENGTHS)
def time_statistics(
    x,
    lengths,
    means,
    scales,
    length,
    width: tl.constexpr,
    eps: tl.constexpr,
    has_lengths: tl.constexpr,
    block_frames: tl.constexpr,
    block_width: tl.constexpr,
):
    """Mean over time and one over the deviation of some channels of one utterance of B x T x C: B x C each.

    Two passes, the second out of cache: squares of what is centred, as the plain form sums them.
    """
    utterance = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block_width + tl.arange(0, block_width)
    in_row = column < width
    end = length
    if has_lengths:
        end = tl.maximum(tl.load(lengths + utterance), 1).to(tl.int32)
    first = x + utterance * length * width + column[None, :]
    total = tl.zeros((block_frames, block_width), tl.float32)
    for start in range(0, end, block_frames):
        frame = start + tl.arange(0, block_frames)
        inside = (frame < end)[:, None] & in_row[None, :]
        total += tl.load(first + frame.to(tl.int64)[:, None] * width, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(total, axis=0) / end
    squares = tl.zeros((block_frames, block_width), tl.float32)
    for start in range(0, end, block_frames):
        frame = start + tl.arange(0, block_frames)
        inside = (frame < end)[:, None] & in_row[None, :]
        value = tl.load(first + frame.to(tl.int64)[:, None] * width, mask=inside, other=0.0).to(tl.float32)
        centred = tl.where(inside, value - mean[None, :], 0.0)
        squares += centred * centred
    scale = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / end + eps)
    tl.store(means + utterance * width + column, mean, mask=in_row)
    tl.store(scales + utterance * width + column, scale, mask=in_row)


@triton.jit(do_not_specialize=_LENGTHS)
def normalized_frames(
    x,
    rows,
    means,
    scales,
    out,
    frames,
    length,
    width: tl.constexpr,
    block_frames: tl.constexpr,
    block_width: tl.constexpr,
):
    """The frames `rows` (N indices into B * T) of `x`, normalised by their utterance's statistics: N x C, float32."""
    position = tl.program_id(0).to(tl.int64) * block_frames + tl.arange(0, block_frames)
    column = tl.arange(0, block_width)
    there = position < frames
    inside = there[:, None] & (column < width)[None, :]
    row = tl.load(rows + position, mask=there, other=0)
    of_utterance = (row // length)[:, None] * width + column[None, :]
    value = tl.load(x + row[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
    mean = tl.load(means + of_utterance, mask=inside, other=0.0)
    scale = tl.load(scales + of_utterance, mask=inside, other=0.0)
    tl.store(out + position[:, None] * width + column[None, :], (value - mean) * scale, mask=inside)


@triton.jit(do_not_specialize=_LENGTHS)
def nearest_codeword(
    targets,
    codewords,
    half_norms,
    labels,
    frames,
    size: tl.constexpr,
    width: tl.constexpr,
    block_frames: tl.constexpr,
    block_size: tl.constexpr,
    block_width: tl.constexpr,
):
    """Labels of a block of frames of one codebook: the smallest `|c|^2 / 2 - t . c`, the first of equals.

    The distances never leave the chip. "ieee": true float32 products, not TF32, which would move labels.
    """
    codebook = tl.program_id(1).to(tl.int64)
    frame = tl.program_id(0).to(tl.int64) * block_frames + tl.arange(0, block_frames)
    inside = frame < frames
    target_rows = targets + (codebook * frames + frame)[:, None] * width
    best = tl.full((block_frames,), float("inf"), tl.float32)
    label = tl.zeros((block_frames,), tl.int32)
    for first in range(0, size, block_size):
        codeword = first + tl.arange(0, block_size)
        exists = codeword < size
        codeword_rows = codewords + (codebook * size + codeword)[None, :] * width
        products = tl.zeros((block_frames, block_size), tl.float32)
        for start in range(0, width, block_width):
            column = start + tl.arange(0, block_width)
            in_row = column < width
            left = tl.load(target_rows + column[None, :], mask=inside[:, None] & in_row[None, :], other=0.0)
            right = tl.load(codeword_rows + column[:, None], mask=in_row[:, None] & exists[None, :], other=0.0)
            products = tl.dot(left, right, products, input_precision="ieee")
        norms = tl.load(half_norms + codebook * size + codeword, mask=exists, other=float("inf"))
        distances = norms[None, :] - products
        nearest, index = tl.min(distances, axis=1, return_indices=True, return_indices_tie_break_left=True)
        closer = nearest < best
        best = tl.where(closer, nearest, best)
        label = tl.where(closer, first + index, label)
    tl.store(labels + codebook * frames + frame, label.to(tl.int64), mask=inside)


@triton.jit(do_not_specialize=_LENGTHS)
def codeword_sums(
    targets,
    order,
    ends,
    sums,
    frames,
    size: tl.constexpr,
    width: tl.constexpr,
    block_frames: tl.constexpr,
    block_width: tl.constexpr,
):
    """Sum of the targets of one codeword, over the frames that `order` lists between two of `ends` (K x V).

    Each sum has one program and a fixed order, unlike with atomic additions.
    """
    codeword = tl.program_id(0)
    codebook = tl.program_id(2).to(tl.int64)
    column = tl.program_id(1) * block_width + tl.arange(0, block_width)
    in_row = column < width
    place = codebook * size + codeword
    end = tl.load(ends + place)
    begin = tl.load(ends + place - 1, mask=codeword > 0, other=0)
    total = tl.zeros((block_width,), tl.float32)
    for start in range(begin, end, block_frames):
        position = start + tl.arange(0, block_frames)
        inside = position < end
        frame = tl.load(order + codebook * frames + position, mask=inside, other=0)
        rows = targets + (codebook * frames + frame)[:, None] * width
        total += tl.sum(tl.load(rows + column[None, :], mask=inside[:, None] & in_row[None, :], other=0.0), axis=0)
    tl.store(sums + place * width + column, total, mask=in_row)


__all__ = [
    "bias_gelu_backward",
    "bias_gelu_forward",
    "codeword_sums",
    "conv_norm_gelu_backward",
    "conv_norm_gelu_forward",
    "grouped_conv",
    "grouped_conv_weight",
    "nearest_codeword",
    "norm_gelu_backward",
    "norm_gelu_forward",
    "normalized_frames",
    "residual_norm_backward",
    "residual_norm_forward",
    "time_statistics",
]
