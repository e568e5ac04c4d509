// Tests of segments and the prefetcher, meant for sanitizers: damaged bytes, many threads, buffers of exact size.

#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "check.hpp"
#include "core/cpu_features.hpp"
#include "store/buffer_pool.hpp"
#include "store/prefetcher.hpp"
#include "store/segment.hpp"
#include "store/unpack.hpp"

namespace {

using namespace crosscoder;
namespace fs = std::filesystem;

class Random {
  public:
    std::uint32_t operator()() {
        state_ = state_ * 6364136223846793005ULL + 1442695040888963407ULL;
        return static_cast<std::uint32_t>(state_ >> 32);
    }
    float normal() {
        float sum = 0;
        for (int i = 0; i < 12; ++i) {
            sum += static_cast<float>((*this)()) / 4294967296.0F;
        }
        return sum - 6.0F;
    }

  private:
    std::uint64_t state_ = 1;
};

struct Folder {
    Folder() {
        std::string pattern = (fs::temp_directory_path() / "store_test_XXXXXX").string();
        CHECK(::mkdtemp(pattern.data()) != nullptr);
        path = pattern;
    }
    ~Folder() { fs::remove_all(path); }
    Folder(const Folder&) = delete;
    Folder& operator=(const Folder&) = delete;
    std::string of(const std::string& name) const { return (path / name).string(); }
    fs::path path;
};

SegmentHead head_of(Item item, std::uint32_t width, std::uint64_t rows, std::uint32_t shard, const std::string& name) {
    SegmentHead head;
    head.item = item;
    head.width = width;
    head.rows = rows;
    head.shard = shard;
    head.store = 77;
    head.group = head.quantised() ? std::min<std::uint32_t>(width, 48) : 0;
    head.name = name;
    return head;
}

std::vector<float> values(std::size_t n) {
    Random random;
    std::vector<float> x(n);
    for (float& value : x) {
        value = random.normal();
    }
    return x;
}

// Every width, every source, both outputs, buffers of exactly that size; all levels give the same bits.
void test_unpacking_stays_within_its_buffers() {
    const IsaLevel best = best_level(detect_cpu_features());
    Random random;
    for (std::size_t n = 1; n < 80; ++n) {
        std::vector<float> wide(n), gain(n), offset(n);
        std::vector<std::uint16_t> half(n);
        std::vector<std::uint8_t> bytes(n);
        for (std::size_t i = 0; i < n; ++i) {
            wide[i] = i % 7 == 3 ? 1e-39F : random.normal();
            gain[i] = random.normal();
            offset[i] = random.normal();
            half[i] = static_cast<std::uint16_t>(random() & 0xbbffU);  // finite as bf16 and as fp16
            bytes[i] = static_cast<std::uint8_t>(random());
        }
        const std::size_t group = n < 20 || n % 3 == 0 ? n : (n % 3 == 1 ? 16 : 34);
        const std::vector<std::uint16_t> scales((n + group - 1) / group, 0x3c01);
        const std::vector<std::uint8_t> pairs(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>((n + 1) / 2));
        const auto all = [&](const UnpackKernels& kernels, bool stream) {
            std::vector<std::uint8_t> out;
            const auto append = [&out](const auto& made) {
                const auto* begin = reinterpret_cast<const std::uint8_t*>(made.data());
                out.insert(out.end(), begin, begin + made.size() * sizeof made[0]);
            };
            const void* sources[3] = {wide.data(), half.data(), half.data()};
            for (int source = 0; source < 3; ++source) {
                std::vector<float> to_float(n);
                std::vector<std::uint16_t> to_half(n);
                kernels.scaled[source][0](sources[source], 1.7F, to_float.data(), n, stream);
                kernels.scaled[source][1](sources[source], 1.7F, to_half.data(), n, stream);
                append(to_float);
                append(to_half);
            }
            const void* quantised[2] = {bytes.data(), pairs.data()};
            for (int source = 0; source < 2; ++source) {
                std::vector<float> to_float(n);
                std::vector<std::uint16_t> to_half(n);
                kernels.quantised[source][0](quantised[source], scales.data(), group, gain.data(), offset.data(),
                                             to_float.data(), n, stream);
                kernels.quantised[source][1](quantised[source], scales.data(), group, gain.data(), offset.data(),
                                             to_half.data(), n, stream);
                append(to_float);
                append(to_half);
            }
            return out;
        };
        const std::vector<std::uint8_t> expected = all(unpack_portable, false);
        for (const IsaLevel level :
             {IsaLevel::portable, IsaLevel::avx2, IsaLevel::avx512, IsaLevel::avx512_bf16}) {
            if (level <= best) {
                CHECK(all(unpack_kernels(level), false) == expected);
                CHECK(all(unpack_kernels(level), true) == expected);
            }
        }
    }
}

void test_round_trips() {
    const Folder folder;
    const std::string path = folder.of("a.seg");
    for (const Item item : {Item::fp32, Item::bf16, Item::fp16, Item::int8, Item::int4}) {
        for (const std::uint32_t width : {1U, 5U, 64U, 300U}) {
            const std::size_t T = 400;
            const std::vector<float> x = values(T * width);
            CHECK(write_activations(path, folder.of("t"), head_of(item, width, T, 3, "step9"), x.data()));
            CHECK(!fs::exists(folder.of("t")));
            SegmentFile file(path);
            CHECK(file.head().name == "step9" && file.head().rows == T && file.damaged_blocks().empty());
            const std::vector<std::int64_t> index = {399, 0, 7, 7, 200};
            std::vector<float> out(index.size() * width);
            file.gather(unpack_kernels(active_level()), index.data(), index.size(), 2.0F, out.data(), width);
            float tolerance = item == Item::fp32 ? 0 : 0.04F;
            if (file.head().quantised()) {  // half a step of the largest value, 6 deviations (of 1), both doubled
                tolerance = item == Item::int8 ? 0.2F : 0.9F;
            }
            for (std::size_t i = 0; i < out.size(); ++i) {
                const float expected = 2.0F * x[static_cast<std::size_t>(index[i / width]) * width + i % width];
                CHECK(std::fabs(out[i] - expected) <= tolerance);
            }
        }
    }
    std::vector<float> x = values(10);
    x[4] = std::nanf("");
    CHECK(!write_activations(folder.of("b"), folder.of("t"), head_of(Item::fp32, 5, 2, 0, "n"), x.data()));
    x[4] = 1e6F;
    CHECK(!write_activations(folder.of("b"), folder.of("t"), head_of(Item::fp16, 5, 2, 0, "n"), x.data()));
    CHECK(!fs::exists(folder.of("b")) && !fs::exists(folder.of("t")));
    CHECK(throws<FileError>([&] {
        write_activations(folder.of("no/b"), folder.of("no/t"), head_of(Item::bf16, 5, 2, 0, "n"), x.data());
    }));
}

// Every byte of the header set to several values, with and without a checksum that is right: refused or harmless.
void test_headers_of_all_kinds(Item item) {
    const Folder folder;
    const std::string path = folder.of("a.seg");
    const std::vector<float> x = values(60);
    CHECK(write_activations(path, folder.of("t"), head_of(item, 6, 10, 0, "s"), x.data()));
    const std::vector<unsigned char> good = format_head(SegmentFile(path).head());
    for (std::size_t at = 0; at < 1100; ++at) {
        for (const int change : {1, 0x80, 0xff}) {
            std::vector<unsigned char> bad = good;
            bad[at] = static_cast<unsigned char>(bad[at] ^ change);
            CHECK(throws<FormatError>([&] { parse_head(bad.data(), bad.size(), path); }));
            SegmentHead head;
            try {
                head = parse_head(good.data(), good.size(), path);
                std::memcpy(&head.width, bad.data() + 36, 4);
                std::memcpy(&head.rows, bad.data() + 40, 8);
                std::memcpy(&head.rows_per_block, bad.data() + 48, 4);
                if (head.width == 6) {
                    const std::vector<unsigned char> signed_again = format_head(head);
                    parse_head(signed_again.data(), signed_again.size(), path);
                }
            } catch (const FormatError&) {
            }
        }
    }
    SegmentHead odd = parse_head(good.data(), good.size(), path);
    odd.group = 3;  // a second group that would begin in the middle of a byte
    const std::vector<unsigned char> bytes = format_head(odd);
    CHECK(throws<FormatError>([&] { parse_head(bytes.data(), bytes.size(), path); }) == (item == Item::int4));
    for (std::size_t size = 0; size < good.size(); size += 97) {
        CHECK(throws<FormatError>([&] { parse_head(good.data(), size, path); }));
    }
}

Window window_of(const std::vector<std::string>& paths, std::size_t K, std::uint64_t rows, std::vector<void*> batches,
                 std::size_t batch_rows) {
    Window window;
    const std::size_t shards = paths.size() / K;
    for (std::size_t shard = 0; shard < shards; ++shard) {
        Run run;
        run.shard = static_cast<std::uint32_t>(shard);
        run.shard_rows = rows;
        run.first = 1;
        run.rows = rows - 1;
        run.target = shard * (rows - 1);
        run.paths.assign(paths.begin() + static_cast<std::ptrdiff_t>(shard * K),
                         paths.begin() + static_cast<std::ptrdiff_t>((shard + 1) * K));
        window.runs.push_back(run);
    }
    const std::size_t total = shards * (rows - 1);
    for (std::size_t i = 0; i < total; ++i) {  // scattered, every seventh row dropped
        window.targets.push_back(i % 7 == 3 ? -1 : static_cast<std::int64_t>(i * 7 % total));
    }
    window.batches = std::move(batches);
    window.batch_rows = batch_rows;
    return window;
}

void test_prefetching() {
    const Folder folder;
    const std::size_t K = 3, shards = 4;
    const std::uint32_t D = 200;
    const std::uint64_t T = 801;
    StoreLayout layout;
    layout.store = 77;
    layout.width = D;
    layout.item = Item::bf16;
    std::vector<std::string> paths;
    for (std::size_t shard = 0; shard < shards; ++shard) {
        for (std::size_t k = 0; k < K; ++k) {
            const std::string name = "snapshot" + std::to_string(k);
            paths.push_back(folder.of(std::to_string(shard) + name));
            std::vector<float> x = values(T * D);
            x[D] = static_cast<float>(shard * K + k);  // row 1, the first that is read
            CHECK(write_activations(paths.back(), folder.of("t"),
                                    head_of(Item::bf16, D, T, static_cast<std::uint32_t>(shard), name), x.data()));
            if (shard == 0) {
                layout.snapshots.push_back(name);
                layout.scales.push_back(1.0F);
            }
        }
    }
    const std::size_t B = 640, total = shards * (T - 1);
    CHECK(total % B == 0);
    std::vector<float> expected;
    for (const unsigned n_threads : {1U, 2U, 7U}) {
        for (const bool direct : {false, true}) {
            layout.direct = direct;
            layout.stream = n_threads == 2;
            BufferPool pool(B * K * D * sizeof(float));
            Prefetcher prefetcher(layout, n_threads);
            for (int round = 0; round < 3; ++round) {
                std::vector<void*> batches;
                for (std::size_t i = 0; i < total / B; ++i) {
                    batches.push_back(pool.take());
                    std::memset(batches.back(), 0, pool.bytes());
                }
                const std::uint64_t ticket = prefetcher.submit(window_of(paths, K, T, batches, B));
                if (round == 1) {
                    prefetcher.drain();  // in the middle of it
                } else {
                    prefetcher.wait(ticket);
                    CHECK(prefetcher.is_done(ticket));
                    std::vector<float> got;
                    for (void* batch : batches) {
                        const auto* begin = static_cast<const float*>(batch);
                        got.insert(got.end(), begin, begin + B * K * D);
                    }
                    if (expected.empty()) {
                        expected = got;
                        CHECK(got[D] == 1.0F);
                    }
                    CHECK(got == expected);
                }
                for (void* batch : batches) {
                    pool.give_back(batch);
                }
            }
        }
    }
    // A damaged block, a foreign file, a missing one: each is the window's error, and the next window is not hurt.
    const fs::path victim = paths[5];
    const fs::path saved = folder.of("saved");
    std::vector<unsigned char> memory(total / B * B * K * D * sizeof(float));
    std::vector<void*> batches;
    for (std::size_t i = 0; i < total / B; ++i) {
        batches.push_back(memory.data() + i * B * K * D * sizeof(float));
    }
    fs::copy_file(victim, saved);
    Prefetcher prefetcher(layout, 3);
    const auto wait_for = [&] { prefetcher.wait(prefetcher.submit(window_of(paths, K, T, batches, B))); };
    {
        std::fstream file(victim, std::ios::in | std::ios::out | std::ios::binary);
        file.seekp(5000);
        file.put('\x55');
    }
    CHECK(throws<FormatError>(wait_for));
    fs::remove(victim);
    Prefetcher again(layout, 3);
    CHECK(throws<FormatError>([&] { again.wait(again.submit(window_of(paths, K, T, batches, B))); }));
    fs::copy_file(paths[4], victim);
    CHECK(throws<FormatError>([&] { again.wait(again.submit(window_of(paths, K, T, batches, B))); }));
    fs::remove(victim);
    fs::copy_file(saved, victim);
    again.wait(again.submit(window_of(paths, K, T, batches, B)));
    {
        Prefetcher dropped(layout, 2);  // destroyed with work to do
        dropped.submit(window_of(paths, K, T, batches, B));
    }
}

// The page of a cut file reads as zeros and is told; a SIGBUS of others goes to the handler that was there before.
volatile int others = 0;
sigjmp_buf elsewhere;

bool jumps_away(const unsigned char* at) {
    if (sigsetjmp(elsewhere, 1) == 0) {
        return *const_cast<const volatile unsigned char*>(at) == 'y';
    }
    return true;
}

void test_mapped_files_that_are_cut() {
    const Folder folder;
    const std::string path = folder.of("mapped");
    const std::vector<char> bytes(16 * kPage, 'x');
    const auto write = [&] { std::ofstream(path, std::ios::binary).write(bytes.data(), 16 * kPage); };
    write();
    struct sigaction before {};
    before.sa_handler = [](int) {
        others = others + 1;
        siglongjmp(elsewhere, 1);
    };
    struct sigaction saved {};
    CHECK(::sigaction(SIGBUS, &before, &saved) == 0);
    const int descriptor = ::open(path.c_str(), O_RDONLY);
    MappedFile file(descriptor, 16 * kPage), other(descriptor, 16 * kPage), whole(descriptor, 16 * kPage);
    CHECK(file.data() != nullptr);
    {
        const MappedFile::Reading reading(whole);
        CHECK(whole.data()[0] == 'x' && whole.data()[16 * kPage - 1] == 'x');
        CHECK(reading.is_whole());
    }
    fs::resize_file(path, 4 * kPage);
    for (int round = 0; round < 2; ++round) {  // twice: a handler that jumps away leaves nothing behind
        const MappedFile::Reading reading(file);
        CHECK(jumps_away(other.data() + 9 * kPage) && others == round + 1);
        CHECK(reading.is_whole());
    }
    sigset_t bus;
    sigemptyset(&bus);
    sigaddset(&bus, SIGBUS);
    CHECK(::pthread_sigmask(SIG_BLOCK, &bus, nullptr) == 0);
    {
        const MappedFile::Reading reading(file);
        CHECK(file.data()[9 * kPage] == 0);
        CHECK(!reading.is_whole());
    }
    CHECK(::pthread_sigmask(SIG_UNBLOCK, &bus, nullptr) == 0);
    CHECK(others == 2);
    CHECK(::sigaction(SIGBUS, &saved, nullptr) == 0);
    ::close(descriptor);
}

// Segments cut and grown again while several threads read them: whole, or refused.
void test_segments_that_are_cut_under_readers() {
    constexpr std::size_t K = 2, T = 4'001, B = 500, total = T - 1;
    constexpr std::uint32_t D = 256;
    const Folder folder;
    std::vector<float> x(T * D);
    for (std::size_t i = 0; i < x.size(); ++i) {
        x[i] = static_cast<float>(i / D);
    }
    StoreLayout layout;
    layout.store = 77;
    layout.width = D;
    layout.item = Item::fp32;
    std::vector<std::string> paths;
    for (std::size_t k = 0; k < K; ++k) {
        layout.snapshots.push_back("s" + std::to_string(k));
        layout.scales.push_back(1.0F);
        paths.push_back(folder.of(layout.snapshots.back()));
        CHECK(write_activations(paths.back(), folder.of("t"), head_of(Item::fp32, D, T, 0, layout.snapshots.back()),
                                x.data()));
    }
    std::vector<float> memory(total * K * D);
    std::vector<void*> batches;
    for (std::size_t i = 0; i < total / B; ++i) {
        batches.push_back(memory.data() + i * B * K * D);
    }
    std::vector<char> bytes(fs::file_size(paths[1]));
    const auto size = static_cast<std::streamsize>(bytes.size());
    std::ifstream(paths[1], std::ios::binary).read(bytes.data(), size);
    int refused = 0;
    for (int round = 0; round < 20; ++round) {
        std::ofstream(paths[1], std::ios::binary).write(bytes.data(), size);
        Prefetcher prefetcher(layout, 3);
        const auto read = [&] { prefetcher.wait(prefetcher.submit(window_of(paths, K, T, batches, B))); };
        read();  // checked: from now on mapped
        std::atomic<bool> stop = false;
        std::thread attacker([&] {
            Random random;
            std::this_thread::sleep_for(std::chrono::microseconds(100 * round));
            while (!stop) {
                fs::resize_file(paths[1], random() % bytes.size());
                fs::resize_file(paths[1], bytes.size());
            }
        });
        for (int i = 0; i < 10; ++i) {
            std::fill(memory.begin(), memory.end(), -1.0F);
            try {
                read();
            } catch (const FormatError&) {
                ++refused;
                continue;
            }
            for (std::size_t i_row = 0; i_row < total; ++i_row) {
                const float wanted = i_row % 7 == 3 ? -1.0F : static_cast<float>(i_row + 1);
                const float* rows = memory.data() + i_row * 7 % total * K * D;
                CHECK(std::all_of(rows, rows + K * D, [&](float value) { return value == wanted; }));
            }
        }
        stop = true;
        attacker.join();
    }
    CHECK(refused > 0);
}

}  // namespace

int main() {
    test_unpacking_stays_within_its_buffers();
    test_round_trips();
    test_headers_of_all_kinds(Item::int8);
    test_headers_of_all_kinds(Item::int4);
    test_prefetching();
    test_mapped_files_that_are_cut();
    test_segments_that_are_cut_under_readers();
    std::puts("store_test: all passed");
    return 0;
}
