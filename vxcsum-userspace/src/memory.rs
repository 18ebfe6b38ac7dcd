//! How much memory the allocator holds.

/// Has large pieces go back to the kernel as soon as they are not in use: a summary that lists all who
/// wait takes some megabytes. By itself, the allocator keeps as much as the largest piece so far.
pub(crate) fn keep_little() {
    #[cfg(target_env = "gnu")]
    {
        /// Where the allocator itself begins, in bytes (mallopt(3)).
        const LARGE: libc::c_int = 128 * 1024;
        for parameter in [libc::M_MMAP_THRESHOLD, libc::M_TRIM_THRESHOLD] {
            // SAFETY: only sets a parameter, which the allocator guards by its own lock.
            unsafe { libc::mallopt(parameter, LARGE) };
        }
    }
}

/// Gives back what is not in use. Loading takes tens of megabytes for a moment (aya reads all types of
/// the kernel), and so may reading rules.
pub(crate) fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: may be called at any time; it only returns what is not in use.
    unsafe {
        libc::malloc_trim(0);
    }
}
