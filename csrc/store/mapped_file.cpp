#include "store/mapped_file.hpp"

#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>

#include <cerrno>
#include <cstdint>

namespace crosscoder {
namespace {

// Only what a signal handler may use: no allocation when the thread first touches these (initial-exec), no locks.
[[gnu::tls_model("initial-exec")]] thread_local MappedFile* reading = nullptr;
[[gnu::tls_model("initial-exec")]] thread_local bool handing_on = false;

// What was installed before, the last first. Never freed: a handler may be looking at it.
struct Replaced {
    struct sigaction action;
    const Replaced* earlier;
};
std::atomic<const Replaced*> previous = nullptr;

void end_as_without_us(int number, const siginfo_t* info) {
    struct sigaction action {};
    action.sa_handler = SIG_DFL;
    ::sigaction(number, &action, nullptr);
    if (info->si_code <= 0) {  // sent by somebody; a fault happens again by itself
        ::raise(number);
    }
}

void hand_on(int number, siginfo_t* info, void* context) {
    const Replaced* replaced = previous.load();
    const struct sigaction* action = replaced != nullptr ? &replaced->action : nullptr;
    const bool by_handler = action != nullptr && ((action->sa_flags & SA_SIGINFO) != 0 ||
                                                  (action->sa_handler != SIG_DFL && action->sa_handler != SIG_IGN));
    const bool handed_back = handing_on && info->si_code <= 0;  // raised again, by a handler that has us as its previous
    if (by_handler && !handed_back) {
        handing_on = true;
        if ((action->sa_flags & SA_SIGINFO) != 0) {
            action->sa_sigaction(number, info, context);
        } else {
            action->sa_handler(number);
        }
        handing_on = false;
        return;
    }
    const bool ignored = action != nullptr && !by_handler && action->sa_handler == SIG_IGN;
    if (!ignored || info->si_code > 0) {  // a fault cannot be ignored
        end_as_without_us(number, info);
    }
}

void on_bus_error(int number, siginfo_t* info, void* context) {
    const int saved = errno;
    if (info->si_code <= 0 || reading == nullptr || !reading->replace(info->si_addr)) {
        hand_on(number, info, context);
    }
    errno = saved;
}

bool is_ours(const struct sigaction& action) {
    return (action.sa_flags & SA_SIGINFO) != 0 && action.sa_sigaction == on_bus_error;
}

// Without a lock: a child of fork() has to get through here too.
void require_handler() {
    struct sigaction now {};
    if (::sigaction(SIGBUS, nullptr, &now) != 0 || is_ours(now)) {
        return;
    }
    previous.store(new Replaced{now, previous.load()});
    struct sigaction ours {};
    ours.sa_sigaction = on_bus_error;
    // NODEFER: a previous handler that raises the signal again must come back here at once, and be noticed.
    ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    struct sigaction replaced {};
    if (::sigaction(SIGBUS, &ours, &replaced) == 0 && !is_ours(replaced)) {
        previous.store(new Replaced{replaced, previous.load()});
    }
}

}  // namespace

MappedFile::MappedFile(int descriptor, std::size_t bytes) : bytes_(bytes) {
    void* mapped = ::mmap(nullptr, bytes, PROT_READ, MAP_SHARED, descriptor, 0);
    data_ = mapped == MAP_FAILED ? nullptr : static_cast<unsigned char*>(mapped);
}

MappedFile::~MappedFile() {
    if (data_ != nullptr) {
        ::munmap(data_, bytes_);
    }
}

bool MappedFile::replace(const void* address) {
    const auto at = reinterpret_cast<std::uintptr_t>(address);
    const auto begin = reinterpret_cast<std::uintptr_t>(data_);
    if (at < begin || at - begin >= bytes_) {
        return false;
    }
    lost_.store(1);  // before any thread can see a zero
    return ::mmap(data_, bytes_, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED;
}

MappedFile::Reading::Reading(MappedFile& file) : file_(file) {
    require_handler();
    sigset_t bus, before;
    sigemptyset(&bus);
    sigaddset(&bus, SIGBUS);
    ::pthread_sigmask(SIG_UNBLOCK, &bus, &before);  // blocked, the signal would end the process
    was_blocked_ = sigismember(&before, SIGBUS) == 1;
    reading = &file;
    std::atomic_signal_fence(std::memory_order_seq_cst);
}

MappedFile::Reading::~Reading() {
    std::atomic_signal_fence(std::memory_order_seq_cst);
    reading = nullptr;
    if (was_blocked_) {
        sigset_t bus;
        sigemptyset(&bus);
        sigaddset(&bus, SIGBUS);
        ::pthread_sigmask(SIG_BLOCK, &bus, nullptr);
    }
}

bool MappedFile::Reading::is_whole() const {
    return file_.lost_.fetch_add(0) == 0;  // writes, so that all reading is over before it
}

}  // namespace crosscoder
