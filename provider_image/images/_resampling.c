/* Resizes RGB images with AVX2 instructions, to exactly the pixels that Pillow computes.
 *
 * Loaded by resampling.py with ctypes, so it needs no headers of Python, runs with any version of it, and holds no lock
 * of it. It must not be trusted blindly: resampling.py compares it with Pillow before it is used.
 *
 * What is computed is what Pillow does with images of 8 bits: a weighted sum along each axis, the result of the first
 * axis rounded to 8 bits, with weights of 22 binary digits after the point. Pillow multiplies 32-bit integers. Here a
 * weight is divided into its lower 15 bits and the rest, so that one instruction multiplies and adds pairs of 16-bit
 * integers; the two sums are put together in 32 bits, where an overflow of either cancels out.
 */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORTED __attribute__((visibility("default")))

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#define USES_AVX2 __attribute__((target("avx2")))

enum {
    PIXEL_BYTES = 4,
    /* Binary digits of a weight after the point, and those of its lower part. */
    WEIGHT_BITS = 22,
    LOW_BITS = 15,
    /* Pixels of a row that are weighted at once, and rows of a column; rows that are worked on at once. */
    PIXELS_AT_ONCE = 4,
    ROWS_AT_ONCE = 4,
};

/* What an output pixel is computed from, along one axis. */
struct axis {
    /* Number of input pixels of every output pixel; those that do not count have the weight 0. */
    int taps;
    /* The first of them, for each output pixel; never decreases. */
    int *first;
    /* The parts of their weights: `taps` for each output pixel. */
    int16_t *low, *high;
};

/* Arrow's C data interface, as its specification defines it. */
struct arrow_array {
    int64_t length, null_count, offset, n_buffers, n_children;
    const void **buffers;
    struct arrow_array **children;
};

static double weight_at(double x, int support)
{
    if (x < 0.0)
        x = -x;
    if (support == 1)
        return x < 1.0 ? 1.0 - x : 0.0;
    /* Cubic convolution with a = -0.5. */
    if (x < 1.0)
        return (1.5 * x - 2.5) * x * x + 1;
    return x < 2.0 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0.0;
}

static void free_axis(struct axis *axis)
{
    free(axis->first);
    free(axis->low);
    free(axis->high);
}

/* Compute the weights of an axis that maps `start` to `end`, of `size` pixels, to `out` pixels. Returns 0 if it cannot;
 * in any case the caller frees the axis. The order of the operations is Pillow's: another rounds differently. */
static int plan_axis(struct axis *axis, int size, float start, float end, int out, int support, int multiple)
{
    double scale = (double)(end - start) / out;
    double stretch = scale < 1.0 ? 1.0 : scale, inverse = 1.0 / stretch, reach = support * stretch;
    int most = 0;

    for (int i = 0; i < out; i++) {
        double centre = start + (i + 0.5) * scale;
        int from = (int)(centre - reach + 0.5), to = (int)(centre + reach + 0.5);
        int count = (to > size ? size : to) - (from < 0 ? 0 : from);
        if (count <= 0)
            return 0;
        most = count > most ? count : most;
    }
    axis->taps = (most + multiple - 1) / multiple * multiple;
    if (axis->taps > size)
        return 0;
    size_t weights = (size_t)out * axis->taps;
    double *values = malloc(axis->taps * sizeof *values);
    axis->first = malloc(out * sizeof *axis->first);
    axis->low = calloc(weights, sizeof *axis->low);
    axis->high = calloc(weights, sizeof *axis->high);
    if (!values || !axis->first || !axis->low || !axis->high) {
        free(values);
        return 0;
    }
    for (int i = 0; i < out; i++) {
        double centre = start + (i + 0.5) * scale, sum = 0.0;
        int from = (int)(centre - reach + 0.5), to = (int)(centre + reach + 0.5);
        from = from < 0 ? 0 : from;
        int count = (to > size ? size : to) - from;
        for (int k = 0; k < count; k++)
            sum += values[k] = weight_at((k + from - centre + 0.5) * inverse, support);
        /* At the end of the input, the pixels begin earlier, with weights of 0. */
        axis->first[i] = from < size - axis->taps ? from : size - axis->taps;
        size_t at = (size_t)i * axis->taps + (from - axis->first[i]);
        for (int k = 0; k < count; k++) {
            double value = (sum != 0.0 ? values[k] / sum : values[k]) * (1 << WEIGHT_BITS);
            int weight = (int)(value < 0 ? value - 0.5 : value + 0.5);
            axis->low[at + k] = (int16_t)(weight & ((1 << LOW_BITS) - 1));
            axis->high[at + k] = (int16_t)(weight >> LOW_BITS);
        }
    }
    free(values);
    return 1;
}

/* Put the two sums together and round them; the result is not yet limited to 0 to 255. */
USES_AVX2 static inline __m256i combine(__m256i low, __m256i high)
{
    __m256i sum = _mm256_add_epi32(low, _mm256_slli_epi32(high, LOW_BITS));
    return _mm256_srai_epi32(_mm256_add_epi32(sum, _mm256_set1_epi32(1 << (WEIGHT_BITS - 1))), WEIGHT_BITS);
}

/* The same for a row's two halves, each of which has the sums of every other pair of pixels. */
USES_AVX2 static inline __m128i combine_halves(__m256i low, __m256i high)
{
    __m256i sum = _mm256_add_epi32(low, _mm256_slli_epi32(high, LOW_BITS));
    __m128i total = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    return _mm_srai_epi32(_mm_add_epi32(total, _mm_set1_epi32(1 << (WEIGHT_BITS - 1))), WEIGHT_BITS);
}

/* Resize ROWS_AT_ONCE rows, which lack the first `skipped` bytes of their image's rows, to `out` pixels each. */
USES_AVX2 static void resize_rows(
    const uint8_t *const *rows, size_t skipped, const struct axis *axis, int out, uint8_t *const *targets)
{
    /* Bytes of four pixels -> pairs of 16 bits, the same channel of two pixels: two pixels in each half. */
    const __m256i pair_pixels = _mm256_setr_epi8(
        0, -1, 4, -1, 1, -1, 5, -1, 2, -1, 6, -1, 3, -1, 7, -1,
        8, -1, 12, -1, 9, -1, 13, -1, 10, -1, 14, -1, 11, -1, 15, -1);
    /* Weights of four pixels -> the first two for every channel in one half, the others in the other. */
    const __m256i pair_weights = _mm256_setr_epi8(
        0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3,
        4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7);

    for (int x = 0; x < out; x++) {
        __m256i low[ROWS_AT_ONCE], high[ROWS_AT_ONCE];
        const int16_t *lows = axis->low + (size_t)x * axis->taps, *highs = axis->high + (size_t)x * axis->taps;
        size_t offset = (size_t)axis->first[x] * PIXEL_BYTES - skipped;

        for (int row = 0; row < ROWS_AT_ONCE; row++)
            low[row] = high[row] = _mm256_setzero_si256();
        for (int tap = 0; tap < axis->taps; tap += PIXELS_AT_ONCE) {
            int64_t some_low, some_high;
            memcpy(&some_low, lows + tap, sizeof some_low);
            memcpy(&some_high, highs + tap, sizeof some_high);
            __m256i low_weights = _mm256_shuffle_epi8(_mm256_set1_epi64x(some_low), pair_weights);
            __m256i high_weights = _mm256_shuffle_epi8(_mm256_set1_epi64x(some_high), pair_weights);
            for (int row = 0; row < ROWS_AT_ONCE; row++) {
                const uint8_t *at = rows[row] + offset + (size_t)tap * PIXEL_BYTES;
                __m256i pixels = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)at));
                pixels = _mm256_shuffle_epi8(pixels, pair_pixels);
                low[row] = _mm256_add_epi32(low[row], _mm256_madd_epi16(pixels, low_weights));
                high[row] = _mm256_add_epi32(high[row], _mm256_madd_epi16(pixels, high_weights));
            }
        }
        __m128i upper = _mm_packs_epi32(combine_halves(low[0], high[0]), combine_halves(low[1], high[1]));
        __m128i lower = _mm_packs_epi32(combine_halves(low[2], high[2]), combine_halves(low[3], high[3]));
        uint32_t found[ROWS_AT_ONCE];
        _mm_storeu_si128((__m128i *)found, _mm_packus_epi16(upper, lower));
        for (int row = 0; row < ROWS_AT_ONCE; row++)
            memcpy(targets[row] + (size_t)x * PIXEL_BYTES, &found[row], PIXEL_BYTES);
    }
}

/* Compute one row from `taps` rows above one another; `bytes` is at least 16. */
USES_AVX2 static void resize_column(
    const uint8_t *const *rows, int taps, const int16_t *lows, const int16_t *highs, size_t bytes, uint8_t *target)
{
    for (size_t done = 0; done < bytes; done += 16) {
        size_t at = done + 16 <= bytes ? done : bytes - 16; /* the last ones may be computed twice */
        __m256i low_left = _mm256_setzero_si256(), high_left = low_left, low_right = low_left, high_right = low_left;

        for (int tap = 0; tap < taps; tap += 2) {
            int32_t two_low, two_high;
            memcpy(&two_low, lows + tap, sizeof two_low);
            memcpy(&two_high, highs + tap, sizeof two_high);
            __m256i low_weights = _mm256_set1_epi32(two_low), high_weights = _mm256_set1_epi32(two_high);
            __m128i upper = _mm_loadu_si128((const __m128i *)(rows[tap] + at));
            __m128i lower = _mm_loadu_si128((const __m128i *)(rows[tap + 1] + at));
            __m256i left = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(upper, lower));
            __m256i right = _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(upper, lower));
            low_left = _mm256_add_epi32(low_left, _mm256_madd_epi16(left, low_weights));
            high_left = _mm256_add_epi32(high_left, _mm256_madd_epi16(left, high_weights));
            low_right = _mm256_add_epi32(low_right, _mm256_madd_epi16(right, low_weights));
            high_right = _mm256_add_epi32(high_right, _mm256_madd_epi16(right, high_weights));
        }
        /* Packing works on each half alone; the permutation restores the order. */
        __m256i both = _mm256_packs_epi32(combine(low_left, high_left), combine(low_right, high_right));
        both = _mm256_permute4x64_epi64(both, 0xd8);
        __m128i packed = _mm_packus_epi16(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
        _mm_storeu_si128((__m128i *)(target + at), packed);
    }
}

struct resizing {
    const uint8_t *pixels;
    int width, height, out_width, out_height;
    struct axis across, down;
    uint8_t *out;
};

/* Rows first: each is resized when the first output row needs it, and kept in a ring until the last one has used it. */
static int rows_first(const struct resizing *job)
{
    size_t row_bytes = (size_t)job->out_width * PIXEL_BYTES, stride = (size_t)job->width * PIXEL_BYTES;
    int taps = job->down.taps, slots = taps + ROWS_AT_ONCE, done = job->down.first[0];
    uint8_t *ring = malloc(slots * row_bytes);
    const uint8_t **needed = malloc(taps * sizeof *needed);
    int is_done = ring && needed;

    for (int y = 0; is_done && y < job->out_height; y++) {
        int first = job->down.first[y];
        while (done < first + taps) {
            const uint8_t *rows[ROWS_AT_ONCE];
            uint8_t *targets[ROWS_AT_ONCE];
            for (int row = 0; row < ROWS_AT_ONCE; row++) {
                int number = done + row < job->height ? done + row : job->height - 1; /* the last one again */
                rows[row] = job->pixels + number * stride;
                targets[row] = ring + number % slots * row_bytes;
            }
            resize_rows(rows, 0, &job->across, job->out_width, targets);
            done += ROWS_AT_ONCE;
        }
        for (int tap = 0; tap < taps; tap++)
            needed[tap] = ring + (first + tap) % slots * row_bytes;
        size_t weights = (size_t)y * taps;
        resize_column(needed, taps, job->down.low + weights, job->down.high + weights, row_bytes,
                      job->out + y * row_bytes);
    }
    free(ring);
    free(needed);
    return is_done;
}

/* Columns first, of those that are needed. */
static int columns_first(const struct resizing *job)
{
    size_t row_bytes = (size_t)job->out_width * PIXEL_BYTES, stride = (size_t)job->width * PIXEL_BYTES;
    int taps = job->down.taps;
    size_t start = (size_t)job->across.first[0] * PIXEL_BYTES;
    size_t bytes = (size_t)(job->across.first[job->out_width - 1] + job->across.taps) * PIXEL_BYTES - start;
    uint8_t *between = malloc(ROWS_AT_ONCE * bytes);
    const uint8_t **needed = malloc(taps * sizeof *needed);
    int is_done = between && needed;

    for (int y = 0; is_done && y < job->out_height; y += ROWS_AT_ONCE) {
        const uint8_t *rows[ROWS_AT_ONCE];
        uint8_t *targets[ROWS_AT_ONCE];
        for (int row = 0; row < ROWS_AT_ONCE; row++) {
            int number = y + row < job->out_height ? y + row : job->out_height - 1;
            uint8_t *target = between + (number - y) * bytes;
            size_t weights = (size_t)number * taps;
            if (number == y + row) {
                for (int tap = 0; tap < taps; tap++)
                    needed[tap] = job->pixels + (job->down.first[number] + tap) * stride + start;
                resize_column(needed, taps, job->down.low + weights, job->down.high + weights, bytes, target);
            }
            rows[row] = target;
            targets[row] = job->out + number * row_bytes;
        }
        resize_rows(rows, start, &job->across, job->out_width, targets);
    }
    free(between);
    free(needed);
    return is_done;
}

/* Tell whether this processor can do it. */
EXPORTED int mlg_can_resample(void)
{
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") != 0;
}

/* Resize a part of an RGB image. The number in the name changes with the parameters, so that a file of another version
 * is not called with wrong ones.
 *
 * image: four bytes a pixel in one piece. box: left, top, right, bottom of the part. support: 1 is a linear filter, 2 a
 * cubic one. out: out_width x out_height pixels of four bytes. Returns 0 if it cannot: too few pixels or no memory.
 */
EXPORTED int mlg_resample_1(
    const struct arrow_array *image, int width, int height, const float *box, int support, int out_width,
    int out_height, uint8_t *out)
{
    const struct arrow_array *channels = image->n_children == 1 ? image->children[0] : NULL;
    if (!channels || image->offset || image->length != (int64_t)width * height || channels->n_buffers != 2 ||
        channels->offset || channels->length != image->length * PIXEL_BYTES)
        return 0;
    if (!(0 <= box[0] && box[0] < box[2] && box[2] <= width && 0 <= box[1] && box[1] < box[3] && box[3] <= height))
        return 0;
    if (out_width < 4 || out_height < 1 || support < 1 || support > 2)
        return 0;

    struct resizing job = {
        .pixels = channels->buffers[1],
        .width = width,
        .height = height,
        .out_width = out_width,
        .out_height = out_height,
        .out = out,
    };
    int is_done = plan_axis(&job.across, width, box[0], box[2], out_width, support, PIXELS_AT_ONCE) &&
                  plan_axis(&job.down, height, box[1], box[3], out_height, support, 2);
    if (is_done) {
        /* Pillow's rule, which looks at the whole image and not at the box. */
        int64_t lost_rows = (int64_t)height - out_height, lost_columns = (int64_t)width - out_width;
        is_done = lost_rows > 0 && lost_rows > 2 * lost_columns ? columns_first(&job) : rows_first(&job);
    }
    free_axis(&job.across);
    free_axis(&job.down);
    return is_done;
}

#else

EXPORTED int mlg_can_resample(void)
{
    return 0;
}

#endif
