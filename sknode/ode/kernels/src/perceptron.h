// A multilayer perceptron on rows, and its reverse sweep: no solve, one evaluation.
//
// The reverse evaluates the network again, tile by tile: that is less work than memory
// for all of its hidden units would be.

// A thread's memory for going over the rows.
template <Activation A, class T>
class RowTiles {
public:
    RowTiles(const Evaluation& problem, const Network<T>& network, Watch& watch,
             const EvaluationReverse* reverse = nullptr)
        : p_(problem), reverse_(reverse), watch_(watch),
          n_in_(network.in(0)), n_out_(network.out(network.depth() - 1)),
          evaluator_(network, reverse ? TILES : 1, reverse != nullptr) {
        const int64_t tiles = reverse ? TILES : 1;
        x_ = arena_.take(tiles * n_in_ * LANES<T>);
        out_ = arena_.take(tiles * n_out_ * LANES<T>);
        if (reverse) cotangent_ = arena_.take(n_in_ * LANES<T>);
    }

    // What one job takes, in rows.
    static constexpr int64_t JOB = 8 * LANES<T>;

    void forward(int64_t job) {
        watch_.look();
        const int64_t end = std::min((job + 1) * JOB, p_.rows);
        for (int64_t first = job * JOB; first < end; first += LANES<T>) {
            const int n = static_cast<int>(std::min<int64_t>(LANES<T>, end - first));
            spread(p_.x, first, n, n_in_, x_);
            evaluator_.evaluate(x_, out_, Tiles::lanes_for(n));
            collect(out_, first, n, n_out_, p_.out);
        }
    }

    void reverse(int64_t job, std::vector<LayerSum<T>>& sums) {
        watch_.look();
        const int64_t end = std::min((job + 1) * JOB, p_.rows);
        int s = 0;
        for (int64_t first = job * JOB; first < end; first += LANES<T>, ++s) {
            const int n = static_cast<int>(std::min<int64_t>(LANES<T>, end - first));
            T *x = x_ + s * n_in_ * LANES<T>, *delta = out_ + s * n_out_ * LANES<T>;
            spread(p_.x, first, n, n_in_, x);
            evaluator_.linearize(s, x, delta, LANES<T>);
            spread(reverse_->grad, first, n, n_out_, delta);
            evaluator_.pullback(s, delta, cotangent_, LANES<T>);
            if (reverse_->grad_x) collect(cotangent_, first, n, n_in_, reverse_->grad_x);
        }
        // of missing rows the cotangents are zero
        evaluator_.accumulate(sums, x_, out_, s, LANES<T>);
    }

private:
    using Tiles = Evaluator<A, T>;
    static constexpr int TILES = JOB / LANES<T>;

    const Evaluation& p_;
    const EvaluationReverse* reverse_;
    Watch& watch_;
    const int64_t n_in_, n_out_;
    Tiles evaluator_;
    Arena<T> arena_;
    T *x_, *out_, *cotangent_ = nullptr;

    // n rows of an array (rows, size) become the first lanes, the others zero.
    static void spread(const void* array, int64_t first, int n, int64_t size, T* tile) {
        const T* from = static_cast<const T*>(array) + first * size;
        for (int64_t i = 0; i < size; ++i) {
            T* to = tile + i * LANES<T>;
            for (int lane = 0; lane < n; ++lane) to[lane] = from[lane * size + i];
            for (int lane = n; lane < LANES<T>; ++lane) to[lane] = T(0);
        }
    }

    // The first lanes become n rows of an array (rows, size).
    static void collect(const T* tile, int64_t first, int n, int64_t size, void* array) {
        T* to = static_cast<T*>(array) + first * size;
        for (int64_t i = 0; i < size; ++i)
            for (int lane = 0; lane < n; ++lane)
                to[lane * size + i] = tile[i * LANES<T> + lane];
    }
};

template <class T, class Tiles>
static int64_t row_jobs(const Evaluation& p) {
    return (p.rows + Tiles::JOB - 1) / Tiles::JOB;
}

template <Activation A, class T>
static void evaluate_with(const Evaluation& p) {
    using Tiles = RowTiles<A, T>;
    const Network<T> network(p.model);
    const int64_t jobs = row_jobs<T, Tiles>(p);
    Watch watch(p.interrupted);
    run_jobs(jobs, p.threads, [&](std::atomic<int64_t>& next) {
        Tiles tiles(p, network, watch);
        for (int64_t i = next++; i < jobs; i = next++) tiles.forward(i);
    });
}

template <Activation A, class T>
static void evaluate_back_with(const EvaluationReverse& problem) {
    using Tiles = RowTiles<A, T>;
    const Evaluation& p = problem.forward;
    const Network<T> network(p.model);
    TileSums<Network<T>> sums(network, row_jobs<T, Tiles>(p));
    Watch watch(p.interrupted);
    run_jobs(sums.chunks(), p.threads, [&](std::atomic<int64_t>& next) {
        Tiles tiles(p, network, watch, &problem);
        for (int64_t c = next++; c < sums.chunks(); c = next++)
            sums.fill(c, [&](int64_t i, std::vector<LayerSum<T>>& sum) { tiles.reverse(i, sum); });
    });
    network.unfold(sums.total(), problem.layers);
}

template <class T>
static void evaluate(const Evaluation& p) {
    with_activation(p.model.activation, [&](auto activation) {
        evaluate_with<decltype(activation)::value, T>(p);
    });
}

template <class T>
static void evaluate_back(const EvaluationReverse& p) {
    with_activation(p.forward.model.activation, [&](auto activation) {
        evaluate_back_with<decltype(activation)::value, T>(p);
    });
}
