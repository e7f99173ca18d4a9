// The multilayer perceptron on a tile of samples: values, vector-Jacobian products,
// parameter gradients.
//
// A tile has LANES samples. Everything about it is stored lane by lane within a row:
// an array of n values a sample has shape (n, LANES). A product with a matrix is then
// multiply-adds of whole registers with one weight each, and no lane sees another.
//
// Where few samples are left, only the leading lanes are computed, and what is in the
// others is left alone. A sample's numbers are the same, to the bit, in any lane and
// beside any number of others.

template <class T>
constexpr int LANES = 128 / sizeof(T);

// How many registers of a row, and how many rows, a product keeps in registers: every
// weight that is read then serves two multiply-adds.
template <class T>
constexpr int GROUP = 2;
template <class T>
constexpr int ROWS = SKNODE_REGISTERS == 32 ? 20 / GROUP<T> : 10 / GROUP<T>;

// Call `action` with the number of registers to take together, as a constant.
template <class T, class Action>
SKNODE_INLINE void with_group(int lanes, const Action& action) {
    if (lanes == width<T>)
        action(std::integral_constant<int, 1>{});
    else
        action(std::integral_constant<int, GROUP<T>>{});
}

// Call `action(at, g)` for the registers of leading lanes: where they are in an array of
// whole rows, and where within their row.
template <class T, class Action>
SKNODE_INLINE void each_register(int64_t size, int lanes, const Action& action) {
    for (int64_t row = 0; row < size; row += LANES<T>)
        for (int g = 0; g < lanes; g += width<T>) action(row + g, g);
}

// Memory for a thread, aligned, given out piece by piece.
template <class T>
class Arena {
public:
    T* take(int64_t n) {
        const int64_t rounded = (n + 63) / 64 * 64;
        blocks_.emplace_back(new char[rounded * sizeof(T) + 64]);
        auto address = reinterpret_cast<uintptr_t>(blocks_.back().get());
        T* p = reinterpret_cast<T*>((address + 63) / 64 * 64);
        std::memset(static_cast<void*>(p), 0, rounded * sizeof(T));
        bytes_ += rounded * sizeof(T) + 64;
        return p;
    }
    int64_t bytes() const { return bytes_; }

private:
    std::vector<std::unique_ptr<char[]>> blocks_;
    int64_t bytes_ = 0;
};

// A matrix in blocks of about equal height, at most ROWS, column by column within a
// block, as products read it.
template <class T>
struct Matrix {
    int64_t rows = 0, cols = 0, height = 1;
    std::vector<T> data;

    Matrix() = default;

    // Entries are `value(row, col)`.
    template <class Value>
    Matrix(int64_t rows, int64_t cols, const Value& value)
        : rows(rows), cols(cols), data(rows * cols) {
        const int64_t blocks = std::max<int64_t>((rows + ROWS<T> - 1) / ROWS<T>, 1);
        height = std::max<int64_t>((rows + blocks - 1) / blocks, 1);
        T* to = data.data();
        for (int64_t first = 0; first < rows; first += height) {
            const int64_t end = std::min<int64_t>(first + height, rows);
            for (int64_t c = 0; c < cols; ++c)
                for (int64_t r = first; r < end; ++r) *to++ = value(r, c);
        }
    }
};

// R rows of matrix * x + bias, G registers at a time.
template <int R, int G, class T>
static inline void product_block(const T* w, const T* bias, const T* x, int64_t cols, T* out,
                                 int lanes) {
    constexpr int W = width<T>;
    // few rows would wait for one another: take some columns at a time; whatever G is,
    // as the order of additions depends on it
    constexpr int CHAINS = R < 2 ? 4 : R < 4 ? 2 : 1;
    for (int g = 0; g < lanes; g += G * W) {
        Vec<T> sum[CHAINS][R][G];
        for (int r = 0; r < R; ++r)
            for (int i = 0; i < G; ++i) {
                sum[0][r][i] = broadcast<T>(bias ? bias[r] : T(0));
                for (int c = 1; c < CHAINS; ++c) sum[c][r][i] = Vec<T>{};
            }
        const auto add = [&](int64_t k, int c) {
            const T *xk = x + k * LANES<T> + g, *wk = w + k * R;
            Vec<T> value[G];
            for (int i = 0; i < G; ++i) value[i] = load(xk + i * W);
            for (int r = 0; r < R; ++r)
                for (int i = 0; i < G; ++i) sum[c][r][i] += value[i] * wk[r];
        };
        int64_t k = 0;
        for (; k + CHAINS <= cols; k += CHAINS)
            for (int c = 0; c < CHAINS; ++c) add(k + c, c);
        for (; k < cols; ++k) add(k, 0);
        for (int c = 1; c < CHAINS; ++c)
            for (int r = 0; r < R; ++r)
                for (int i = 0; i < G; ++i) sum[0][r][i] += sum[c][r][i];
        for (int r = 0; r < R; ++r)
            for (int i = 0; i < G; ++i) store(out + r * LANES<T> + g + i * W, sum[0][r][i]);
    }
}

template <int R, int G, class T>
static void product_rows(int64_t rows, const T* w, const T* bias, const T* x, int64_t cols,
                         T* out, int lanes) {
    if constexpr (R > 0) {
        if (rows == R)
            product_block<R, G>(w, bias, x, cols, out, lanes);
        else
            product_rows<R - 1, G>(rows, w, bias, x, cols, out, lanes);
    }
}

template <class T>
constexpr const T* NO_BIAS = nullptr;

// out = matrix * x + bias, on (rows, LANES) and (cols, LANES); a bias may be missing.
template <class T>
static void product(const Matrix<T>& m, const T* bias, const T* x, T* out,
                    int lanes = LANES<T>) {
    for (int64_t first = 0; first < m.rows; first += m.height) {
        const int64_t rows = std::min<int64_t>(m.height, m.rows - first);
        const T* w = m.data.data() + first * m.cols;
        const T* b = bias ? bias + first : nullptr;
        with_group<T>(lanes, [&](auto group) {
            product_rows<ROWS<T>, decltype(group)::value>(rows, w, b, x, m.cols,
                                                          out + first * LANES<T>, lanes);
        });
    }
}

// out = activation of x, of R rows and G registers of each.
template <Activation A, int R, int G, class T>
static inline void activate_block(const T* x, T* out) {
    constexpr int W = width<T>, N = R * G;
    Vec<T> z[N];
    for (int k = 0; k < N; ++k) z[k] = load(x + k / G * LANES<T> + k % G * W);
    if constexpr (A == Activation::sigmoid || A == Activation::tanh)
        logistic_of_power<T, N>(z, z);
    else
        for (int k = 0; k < N; ++k) z[k] = activate<A, T>(z[k]);
    for (int k = 0; k < N; ++k) store(out + k / G * LANES<T> + k % G * W, z[k]);
}

// out = activation of x, of `rows` rows. Apart from the products, whose sums fill all
// registers.
template <Activation A, class T>
static void activate_rows(int64_t rows, const T* x, T* out, int lanes = LANES<T>) {
    with_group<T>(lanes, [&](auto group) {
        constexpr int G = decltype(group)::value, R = 4 / G;
        for (int g = 0; g < lanes; g += G * width<T>) {
            int64_t r = 0;
            for (; r + R <= rows; r += R)
                activate_block<A, R, G>(x + r * LANES<T> + g, out + r * LANES<T> + g);
            for (; r < rows; ++r)
                activate_block<A, 1, G>(x + r * LANES<T> + g, out + r * LANES<T> + g);
        }
    });
}

// Turn a block of width x width values around: rows become columns.
template <class T, int S, int... E>
static inline void turn_pairs(Vec<T>* rows, std::integer_sequence<int, E...>) {
    constexpr int W = width<T>;
    if constexpr (S < W) {
        for (int i = 0; i < W; ++i) {
            if (i & S) continue;
            const Vec<T> a = rows[i], b = rows[i + S];
            rows[i] = __builtin_shufflevector(a, b, ((E & S) == 0 ? E : W + E - S)...);
            rows[i + S] = __builtin_shufflevector(a, b, ((E & S) == 0 ? E + S : W + E)...);
        }
        turn_pairs<T, S * 2>(rows, std::integer_sequence<int, E...>{});
    }
}

// Copy leading lanes of (n, LANES) to (lanes, stride), stride a multiple of the
// register's width.
template <class T>
static void turn(const T* from, int64_t n, T* to, int64_t stride, int lanes) {
    constexpr int W = width<T>;
    for (int64_t i = 0; i < n; i += W)
        for (int g = 0; g < lanes; g += W) {
            Vec<T> rows[W];
            for (int r = 0; r < W; ++r)
                rows[r] = i + r < n ? load(from + (i + r) * LANES<T> + g) : Vec<T>{};
            turn_pairs<T, 1>(rows, std::make_integer_sequence<int, W>{});
            for (int r = 0; r < W; ++r) store(to + (g + r) * stride + i, rows[r]);
        }
}

// gradient (R rows, N registers) += sum over stages and lanes of delta * x.
template <int R, int N, class T>
static inline void outer_block(const T* delta, int64_t delta_stage, const T* x,
                               int64_t stride, int n_stages, T* gradient, int lanes) {
    constexpr int W = width<T>;
    Vec<T> sum[R][N];
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < N; ++i) sum[r][i] = load(gradient + r * stride + i * W);
    for (int s = 0; s < n_stages; ++s) {
        const T* d = delta + s * delta_stage;
        for (int lane = 0; lane < lanes; ++lane) {
            Vec<T> value[N];
            for (int i = 0; i < N; ++i) value[i] = load(x + i * W);
            for (int r = 0; r < R; ++r)
                for (int i = 0; i < N; ++i) sum[r][i] += value[i] * d[r * LANES<T> + lane];
            x += stride;
        }
    }
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < N; ++i) store(gradient + r * stride + i * W, sum[r][i]);
}

template <int N, class T>
static void outer_column(int64_t rows, const T* delta, int64_t delta_stage, const T* x,
                         int64_t stride, int n_stages, T* gradient, int lanes) {
    constexpr int R = SKNODE_REGISTERS == 32 ? 8 : 4;
    int64_t r = 0;
    for (; r + R <= rows; r += R)
        outer_block<R, N>(delta + r * LANES<T>, delta_stage, x, stride, n_stages,
                          gradient + r * stride, lanes);
    for (; r + 2 <= rows; r += 2)
        outer_block<2, N>(delta + r * LANES<T>, delta_stage, x, stride, n_stages,
                          gradient + r * stride, lanes);
    for (; r < rows; ++r)
        outer_block<1, N>(delta + r * LANES<T>, delta_stage, x, stride, n_stages,
                          gradient + r * stride, lanes);
}

// Sums of registers, reduced a register's width of them at a time.
template <class T>
class Totals {
public:
    void add(Vec<T> v, T* target) {
        rows_[n_] = v, targets_[n_] = target;
        if (++n_ == width<T>) flush();
    }
    void flush() {
        constexpr int W = width<T>;
        for (int i = n_; i < W; ++i) rows_[i] = Vec<T>{};
        turn_pairs<T, 1>(rows_, std::make_integer_sequence<int, W>{});
        for (int step = W / 2; step > 0; step /= 2)
            for (int i = 0; i < step; ++i) rows_[i] += rows_[i + step];
        for (int i = 0; i < n_; ++i) *targets_[i] += rows_[0][i];
        n_ = 0;
    }

private:
    Vec<T> rows_[width<T>];
    T* targets_[width<T>];
    int n_ = 0;
};

// sums (R x C registers) += delta * x over stages and lanes, lane by lane.
template <int R, int C, class T>
static inline void lanes_block(const T* delta, int64_t delta_stage, const T* x,
                               int64_t x_stage, int n_stages, T* sums, int64_t stride,
                               int lanes) {
    constexpr int W = width<T>;
    Vec<T> sum[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) sum[r][c] = load(sums + r * stride + c * W);
    for (int s = 0; s < n_stages; ++s)
        for (int g = 0; g < lanes; g += W) {
            Vec<T> value[C];
            for (int c = 0; c < C; ++c) value[c] = load(x + s * x_stage + c * LANES<T> + g);
            for (int r = 0; r < R; ++r) {
                const Vec<T> d = load(delta + s * delta_stage + r * LANES<T> + g);
                for (int c = 0; c < C; ++c) sum[r][c] += d * value[c];
            }
        }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) store(sums + r * stride + c * W, sum[r][c]);
}

template <int R, class T>
static void lanes_rows(int64_t cols, const T* delta, int64_t delta_stage, const T* x,
                       int64_t x_stage, int n_stages, T* sums, int64_t stride, int lanes) {
    int64_t c = 0;
    for (; c + 4 <= cols; c += 4)
        lanes_block<R, 4>(delta, delta_stage, x + c * LANES<T>, x_stage, n_stages,
                          sums + c * width<T>, stride, lanes);
    for (; c < cols; ++c)
        lanes_block<R, 1>(delta, delta_stage, x + c * LANES<T>, x_stage, n_stages,
                          sums + c * width<T>, stride, lanes);
}

// The gradient of one layer, summed over the samples of a block. Small layers keep a
// register for every weight, which is only summed up by `finish`.
template <class T>
struct LayerSum {
    int64_t rows, cols, stride;
    bool small;   // whether there is a register for every weight
    bool turned;  // whether the sum runs along registers of inputs or of lanes
    T *weight, *bias, *sums = nullptr, *bias_sums = nullptr;

    LayerSum(int64_t rows, int64_t cols, Arena<T>& arena) : rows(rows), cols(cols) {
        stride = (cols + width<T> - 1) / width<T> * width<T>;
        small = rows * cols * SKNODE_VECTOR_BYTES <= SMALL_BYTES;
        // turning the inputs pays where there are many outputs and some inputs
        turned = rows >= 8 && cols >= width<T> / 4;
        weight = arena.take(rows * stride);
        bias = arena.take(rows);
        if (!small) return;
        sums = arena.take(rows * cols * width<T>);
        bias_sums = arena.take(rows * width<T>);
    }

    // Add the stages of a step: delta (stages, rows, LANES), x (stages, cols, LANES), of
    // the leading lanes.
    void add(const T* delta, const T* x, int n_stages, T* scratch, int lanes = LANES<T>) {
        if (small)
            add_small(delta, x, n_stages, lanes);
        else
            add_large(delta, x, n_stages, scratch, lanes);
    }

    // All has been added.
    void finish() {
        if (!small) return;
        Totals<T> totals;
        for (int64_t r = 0; r < rows; ++r) {
            totals.add(load(bias_sums + r * width<T>), bias + r);
            for (int64_t c = 0; c < cols; ++c)
                totals.add(load(sums + (r * cols + c) * width<T>), weight + r * stride + c);
        }
        totals.flush();
    }

private:
    // about half of the first-level cache: a step reads and writes all of it
    static constexpr int64_t SMALL_BYTES = 1 << 15;

    void add_small(const T* delta, const T* x, int n_stages, int lanes) {
        constexpr int W = width<T>, R = SKNODE_REGISTERS == 32 ? 4 : 2;
        const int64_t delta_stage = rows * LANES<T>, x_stage = cols * LANES<T>;
        int64_t r = 0;
        for (; r + R <= rows; r += R)
            lanes_rows<R>(cols, delta + r * LANES<T>, delta_stage, x, x_stage, n_stages,
                          sums + r * cols * W, cols * W, lanes);
        for (; r < rows; ++r)
            lanes_rows<1>(cols, delta + r * LANES<T>, delta_stage, x, x_stage, n_stages,
                          sums + r * cols * W, cols * W, lanes);
        for (r = 0; r < rows; ++r) {
            Vec<T> sum = load(bias_sums + r * W);
            for (int s = 0; s < n_stages; ++s)
                for (int g = 0; g < lanes; g += W)
                    sum += load(delta + s * delta_stage + r * LANES<T> + g);
            store(bias_sums + r * W, sum);
        }
    }

    void add_large(const T* delta, const T* x, int n_stages, T* scratch, int lanes) {
        constexpr int W = width<T>;
        const int64_t delta_stage = rows * LANES<T>, x_stage = cols * LANES<T>;
        Totals<T> totals;
        for (int64_t r = 0; r < rows; ++r) {
            Vec<T> sum{};
            for (int s = 0; s < n_stages; ++s)
                for (int g = 0; g < lanes; g += W)
                    sum += load(delta + s * delta_stage + r * LANES<T> + g);
            totals.add(sum, bias + r);
        }
        if (turned) {
            for (int s = 0; s < n_stages; ++s)
                turn(x + s * x_stage, cols, scratch + s * lanes * stride, stride, lanes);
            int64_t c = 0;
            for (; c + 2 * W <= stride; c += 2 * W)
                outer_column<2>(rows, delta, delta_stage, scratch + c, stride, n_stages,
                                weight + c, lanes);
            for (; c < stride; c += W)
                outer_column<1>(rows, delta, delta_stage, scratch + c, stride, n_stages,
                                weight + c, lanes);
        } else {
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t c = 0; c < cols; ++c) {
                    Vec<T> sum{};
                    for (int s = 0; s < n_stages; ++s)
                        for (int g = 0; g < lanes; g += W)
                            sum += load(delta + s * delta_stage + r * LANES<T> + g) *
                                   load(x + s * x_stage + c * LANES<T> + g);
                    totals.add(sum, weight + r * stride + c);
                }
        }
        totals.flush();
    }
};

// The network of a solve, its weights laid out for products; the constants of the
// activation are folded into them: a(z) = scale * kernel(factor * power * z) + shift,
// where `slope` is the derivative of the kernel over `power`.
template <class T>
class Network {
public:
    using Value = T;
    int64_t dim, inputs;  // with time, inputs = dim + 1
    bool uses_time;
    std::vector<Matrix<T>> forward, backward;
    std::vector<std::vector<T>> bias;
    Activation activation;

    explicit Network(const Model& model)
        : dim(model.dim), inputs(model.dim + model.uses_time), uses_time(model.uses_time),
          activation(model.activation), layers_(model.layers) {
        const bool tanh = activation == Activation::tanh;
        factor_ = tanh ? 2 : 1, scale_ = tanh ? 2 : 1, shift_ = tanh ? -1 : 0;
        power_ = tanh || activation == Activation::sigmoid ? T(-LOG2_E) : T(1);
        for (size_t l = 0; l < layers_.size(); ++l) add_layer(l);
    }

    size_t depth() const { return layers_.size(); }
    int64_t parameters() const {
        int64_t n = 0;
        for (const Layer& layer : layers_) n += layer.out * (layer.in + 1);
        return n;
    }
    int64_t out(size_t layer) const { return layers_[layer].out; }
    int64_t in(size_t layer) const { return layers_[layer].in; }
    int64_t widest() const {
        int64_t n = 1;
        for (const Layer& layer : layers_) n = std::max({n, layer.in, layer.out});
        return n;
    }

    // Bring the sums back to the gradients of the layers as the user has them.
    void unfold(const std::vector<LayerSum<T>>& sums,
                const std::vector<LayerGradient>& gradients) const {
        for (size_t l = 0; l < depth(); ++l) {
            const LayerSum<T>& sum = sums[l];
            const T outer = l + 1 < depth() ? factor_ : 1, inner = l > 0 ? scale_ : 1;
            T* weight = static_cast<T*>(gradients[l].weight);
            T* bias = static_cast<T*>(gradients[l].bias);
            for (int64_t r = 0; r < sum.rows; ++r) {
                const T b = sum.bias[r] * outer;
                if (bias) bias[r] = b;
                for (int64_t c = 0; c < sum.cols; ++c)
                    weight[r * sum.cols + c] = sum.weight[r * sum.stride + c] * (outer * inner) +
                                               (l > 0 ? b * shift_ : T(0));
            }
        }
    }

private:
    std::vector<Layer> layers_;
    T factor_, scale_, shift_, power_;

    void add_layer(size_t l) {
        const Layer& layer = layers_[l];
        const T* weight = static_cast<const T*>(layer.weight);
        const T* b = static_cast<const T*>(layer.bias);
        const bool activated = l + 1 < layers_.size();
        const T outer = activated ? factor_ : 1, inner = l > 0 ? scale_ : 1;
        const T power = activated ? power_ : 1;
        forward.emplace_back(layer.out, layer.in, [&](int64_t r, int64_t c) {
            return weight[r * layer.in + c] * (outer * inner * power);
        });
        const int64_t back = l == 0 ? dim : layer.in;  // no cotangent of time
        backward.emplace_back(back, layer.out, [&](int64_t c, int64_t r) {
            return weight[r * layer.in + c] * (outer * inner);
        });
        bias.emplace_back(layer.out);
        for (int64_t r = 0; r < layer.out; ++r) {
            T sum = 0;
            for (int64_t c = 0; l > 0 && c < layer.in; ++c) sum += weight[r * layer.in + c];
            bias[l][r] = ((b ? b[r] : T(0)) + shift_ * sum) * (outer * power);
        }
    }
};

// A thread's memory for evaluating a network on one tile.
template <Activation A, class T>
class Evaluator {
public:
    using Value = T;
    using Net = Network<T>;

    Evaluator(const Network<T>& network, int n_stages, bool reverse)
        : net_(network), n_stages_(n_stages) {
        const int64_t widest = network.widest() * LANES<T>;
        ping_ = arena_.take(widest), pong_ = arena_.take(widest);
        if (!reverse) return;
        const size_t hidden = network.depth() - 1;
        for (size_t l = 0; l < hidden; ++l) {
            const int64_t n = network.out(l) * LANES<T> * n_stages;
            values_.push_back(arena_.take(n));
            arguments_.push_back(keeps_argument<A> ? arena_.take(n) : nullptr);
            deltas_.push_back(arena_.take(n));
        }
        turned_ = arena_.take((network.widest() + width<T>) * LANES<T> * n_stages);
    }

    // The lanes to compute for n samples: those of one register, or of groups.
    static int lanes_for(int n) {
        constexpr int group = GROUP<T> * width<T>;
        return n <= width<T> ? width<T> : (n + group - 1) / group * group;
    }

    // slope = f(x) on (inputs, LANES), in the leading lanes.
    void evaluate(const T* x, T* slope, int lanes) {
        const size_t last = net_.depth() - 1;
        for (size_t l = 0; l < last; ++l) {
            T* out = l % 2 ? pong_ : ping_;
            product(net_.forward[l], net_.bias[l].data(), x, out, lanes);
            activate_rows<A>(net_.out(l), out, out, lanes);
            x = out;
        }
        product(net_.forward[last], net_.bias[last].data(), x, slope, lanes);
    }

    // The same; keep what the reverse of this stage needs.
    void linearize(int stage, const T* x, T* slope, int lanes) {
        const size_t last = net_.depth() - 1;
        for (size_t l = 0; l < last; ++l) {
            T* out = at(values_[l], l, stage);
            T* argument = keeps_argument<A> ? at(arguments_[l], l, stage) : out;
            product(net_.forward[l], net_.bias[l].data(), x, argument, lanes);
            activate_rows<A>(net_.out(l), argument, out, lanes);
            x = out;
        }
        product(net_.forward[last], net_.bias[last].data(), x, slope, lanes);
    }

    // out (dim, LANES) = (df/dx)^T cotangent at a stage.
    void pullback(int stage, const T* cotangent, T* out, int lanes) {
        const T* delta = cotangent;
        for (size_t l = net_.depth() - 1; l > 0; --l) {
            T* to = at(deltas_[l - 1], l - 1, stage);
            product(net_.backward[l], NO_BIAS<T>, delta, to, lanes);
            const T* kept =
                at(keeps_argument<A> ? arguments_[l - 1] : values_[l - 1], l - 1, stage);
            each_register<T>(net_.out(l - 1) * LANES<T>, lanes, [&](int64_t i, int) {
                store(to + i, load(to + i) * slope<A, T>(load(kept + i)));
            });
            delta = to;
        }
        product(net_.backward[0], NO_BIAS<T>, delta, out, lanes);
    }

    // Add the parameter gradients of n stages and the leading lanes: states (stages,
    // inputs, LANES), cotangents (stages, dim, LANES).
    void accumulate(std::vector<LayerSum<T>>& sums, const T* states, const T* cotangents,
                    int n, int lanes) {
        const size_t last = net_.depth() - 1;
        for (size_t l = 0; l <= last; ++l) {
            const T* delta = l < last ? deltas_[l] : cotangents;
            const T* x = l > 0 ? values_[l - 1] : states;
            sums[l].add(delta, x, n, turned_, lanes);
        }
    }

    // The same for n stages from one on, with weights of shape (n, LANES).
    void accumulate(std::vector<LayerSum<T>>& sums, const T* states, const T* cotangents,
                    int from, int n, const T* weights, int lanes) {
        if (!weighted_) weighted_ = arena_.take(net_.widest() * LANES<T> * n_stages_);
        const size_t last = net_.depth() - 1;
        for (size_t l = 0; l <= last; ++l) {
            const int64_t size = net_.out(l) * LANES<T>;
            const T* delta = (l < last ? deltas_[l] : cotangents) + from * size;
            for (int s = 0; s < n; ++s)
                each_register<T>(size, lanes, [&](int64_t at, int g) {
                    store(weighted_ + s * size + at,
                          load(delta + s * size + at) * load(weights + s * LANES<T> + g));
                });
            const T* x = l > 0 ? values_[l - 1] : states;
            sums[l].add(weighted_, x + from * net_.in(l) * LANES<T>, n, turned_, lanes);
        }
    }

    // Copy what a stage keeps of a lane to another stage.
    void copy(int from, int to, int lane) {
        for_each_kept([&](T* memory, int64_t rows) {
            const T* source = memory + from * rows * LANES<T> + lane;
            T* target = memory + to * rows * LANES<T> + lane;
            for (int64_t i = 0; i < rows; ++i) target[i * LANES<T>] = source[i * LANES<T>];
        });
    }

    // Forget what a stage keeps of a lane.
    void clear(int stage, int lane) {
        for_each_kept([&](T* memory, int64_t rows) {
            T* target = memory + stage * rows * LANES<T> + lane;
            for (int64_t i = 0; i < rows; ++i) target[i * LANES<T>] = T(0);
        });
    }

private:
    const Network<T>& net_;
    int n_stages_;
    Arena<T> arena_;
    T *ping_, *pong_, *turned_ = nullptr, *weighted_ = nullptr;
    std::vector<T*> values_, arguments_, deltas_;

    template <class Action>
    void for_each_kept(const Action& action) {
        for (size_t l = 0; l + 1 < net_.depth(); ++l)
            for (T* memory : {values_[l], arguments_[l], deltas_[l]})
                if (memory) action(memory, net_.out(l));
    }

    T* at(T* memory, size_t layer, int stage) const {
        return memory + stage * net_.out(layer) * LANES<T>;
    }
};
