//! Tells the linker what kernels before 5.3 need: they refuse loops.

fn main() {
    println!("cargo:rustc-link-arg-bin=vxcsum-ebpf-legacy=--unroll-loops");
}
