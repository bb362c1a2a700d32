// Scores of a quantized head without unpacking it: y[b][v] = sum_j scale[v][j / group] * (q[v][j] - middle) * x[b][j].
//
// Rows are read once, TILE at a time, for all hidden states: a span of their words is turned into a tile of tiles.hpp,
// which stays in the nearest cache while the groups of columns in it meet the states.

#include <optional>

#include "threads.hpp"
#include "tiles.hpp"

namespace {

constexpr int64_t SPAN = 64;  // words of a row in a tile

// The codes of some columns of one group, as far as a plane has them.
struct Part {
    int64_t group, begin, end;    // columns
    int64_t first, words;         // where they are in a packed row
    std::optional<States> states;
};

struct Plane {
    const uint8_t* codes;
    int64_t width, bytes;  // of a row
    int64_t shift;
    float middle;
    std::vector<Part> parts;

    Plane(const uint8_t* codes, int64_t width, int64_t shift, float middle, int64_t dim, int64_t group)
        : codes(codes), width(width), bytes((dim * width + 7) / 8), shift(shift), middle(middle) {
        const int64_t per_word = 32 / width, most = SPAN * per_word;
        for (int64_t begin = 0, end; begin < dim; begin = end) {
            const int64_t own = begin / group, next = (begin / most + 1) * most;
            end = std::min({dim, (own + 1) * group, next});
            const int64_t first = begin / per_word, last = (end - 1) / per_word;
            parts.push_back({own, begin, end, first, last - first + 1, std::nullopt});
        }
    }
};

// Words `from[row][word]` to `to[word][row]`, `stride` bytes from row to row.
inline void turn(const uint8_t* from, int64_t stride, int64_t rows, int64_t words, uint8_t* to) {
    int64_t r = 0;
#if defined(__AVX2__)
    for (; r + LANES <= rows; r += LANES) {
        const uint8_t* here = from + r * stride;
        int64_t w = 0;
        for (; w + 4 <= words; w += 4) {  // four words of every fourth row are a vector
            Words a[4];
            EACH(i, 4) a[i] = quarters(here + i * stride + w * 4, 4 * stride);
            const Words p = lower32(a[0], a[1]), q = lower32(a[2], a[3]), s = upper32(a[0], a[1]), t = upper32(a[2], a[3]);
            store(to + (w * TILE + r) * 4, lower64(p, q));
            store(to + ((w + 1) * TILE + r) * 4, upper64(p, q));
            store(to + ((w + 2) * TILE + r) * 4, lower64(s, t));
            store(to + ((w + 3) * TILE + r) * 4, upper64(s, t));
        }
        for (; w < words; ++w)
            EACH(i, LANES) std::memcpy(to + (w * TILE + r + i) * 4, here + i * stride + w * 4, 4);
    }
#endif
    for (; r < rows; ++r)
        for (int64_t w = 0; w < words; ++w) std::memcpy(to + (w * TILE + r) * 4, from + r * stride + w * 4, 4);
}

// The same for words of packed rows from word `first` on; the last word of a row may have fewer than 4 bytes.
void turn(const Plane& plane, int64_t row, int64_t rows, int64_t first, int64_t words, uint8_t* to) {
    const uint8_t* from = plane.codes + row * plane.bytes + first * 4;
    const int64_t whole = std::min(words, plane.bytes / 4 - first);
    turn(from, plane.bytes, rows, whole, to);
    for (int64_t r = 0; r < rows && whole < words; ++r)
        std::memcpy(to + (whole * TILE + r) * 4, from + r * plane.bytes + whole * 4, plane.bytes % 4);
}

}  // namespace

extern "C" const char* instructions() { return instructions_of_tiles(); }

// codes: of each plane, the highest bits first; scale: [row][group of columns].
extern "C" void quantized_scores(const uint8_t* const* codes, const int64_t* widths, int64_t n_planes, int64_t bits,
                                 float middle, const float* scale, int64_t group, int64_t vocab, int64_t dim,
                                 const float* x, int64_t batch, float* out, int64_t threads) {
    // each plane has its own share of the middle: in all (2^bits - 1) / 2
    std::vector<Plane> planes;
    std::vector<std::pair<Plane*, Part*>> jobs;
    planes.reserve(n_planes);
    for (int64_t i = 0; i < n_planes; ++i) {
        bits -= widths[i];
        const float own = n_planes > 1 ? static_cast<float>((1 << widths[i]) - 1) / 2 : middle;
        planes.emplace_back(codes[i], widths[i], bits, own, dim, group);
        for (Part& part : planes.back().parts) jobs.emplace_back(&planes.back(), &part);
    }
    share(static_cast<int64_t>(jobs.size()), 1, threads, [&](int64_t job, int64_t) {
        const auto& [plane, part] = jobs[job];
        const int64_t before = part->begin - part->first * 32 / plane->width;  // columns of another group
        const float* own = x + part->begin - before;
        part->states.emplace(batch, before + part->end - part->begin, part->words, plane->width, plane->middle,
                             [&](int64_t b, int64_t j) { return j < before ? 0.0f : own[b * dim + j]; });
        for (float& step : part->states->step) step *= static_cast<float>(1 << plane->shift);
    });
    const int64_t groups = dim / group;
    share((vocab + TILE - 1) / TILE, 4, threads, [&](int64_t begin, int64_t end) {
        const Registers registers(batch);
        const Lines tile(SPAN * TILE * 4), factors(groups * TILE * 4), sums(batch * TILE * 4);
        float* sum = sums.data<float>();
        for (int64_t k = begin; k < end; ++k) {
            const int64_t row = k * TILE, count = std::min(TILE, vocab - row);
            turn(reinterpret_cast<const uint8_t*>(scale + row * groups), groups * 4, count, groups, factors.data());
            std::fill_n(sum, batch * TILE, 0.0f);
            for (const Plane& plane : planes)
                for (auto part = plane.parts.begin(); part != plane.parts.end();) {
                    const int64_t first = part->first;
                    auto last = part;  // as many parts as the tile has room for
                    while (++last != plane.parts.end() && last->first + last->words - first <= SPAN) {}
                    turn(plane, row, count, first, last[-1].first + last[-1].words - first, tile.data());
                    for (; part != last; ++part) {
                        const uint8_t* later = plane.codes + (row + TILE) * plane.bytes + part->first * 4 * TILE;
                        for (int64_t i = 0; i < part->words * 4; ++i) __builtin_prefetch(later + i * 64);
                        products(plane.width, tile.data() + (part->first - first) * TILE * 4, *part->states,
                                 factors.data<float>() + part->group * TILE, sum);
                    }
                }
            for (int64_t b = 0; b < batch; ++b) std::copy_n(sum + b * TILE, count, out + b * vocab + row);
        }
    });
}
