//! The real cudarc against the fake driver. Each test starts itself again as a child, in whose environment the fake
//! library is found first, and whose device is in the trouble the test is about.

use cudarc::driver::sys::{self, CUfunction_attribute_enum, CUresult};
use cudarc::driver::{
    CudaContext, CudaFunction, CudaModule, CudaSlice, CudaStream, LaunchConfig, PushKernelArg,
};
use cudarc::nvrtc::Ptx;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

/// Set in children, to the name of the test.
const CHILD: &str = "ATTAR_FAKE_CUDA_TEST";

/// Runs `body` in a child process of this test with `environment`; in the child, here.
fn in_child(test: &str, environment: &[(&str, &str)], body: impl FnOnce()) {
    if std::env::var(CHILD).as_deref() == Ok(test) {
        body();
        return;
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fake-cuda");
    let folder = attar_fake_cuda::install(&folder).expect("the fake driver");
    let output = Command::new(std::env::current_exe().expect("this program"))
        .args([test, "--exact", "--nocapture", "--test-threads=1"])
        .env("LD_LIBRARY_PATH", folder)
        .env(CHILD, test)
        .envs(environment.iter().copied())
        .output()
        .expect("a child");
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

fn kernels(target: &str, name: &str) -> String {
    let path = format!("{}/../ptx/tests/kernels/{name}.{target}.ptx", env!("CARGO_MANIFEST_DIR"));
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// A context without event tracking, which captures must not have, and a stream of its own.
fn device() -> (Arc<CudaContext>, Arc<CudaStream>) {
    let context = CudaContext::new(0).expect("a context");
    // SAFETY: every test here uses one stream, or makes streams wait for each other.
    unsafe { context.disable_event_tracking() };
    let stream = context.new_stream().expect("a stream");
    (context, stream)
}

fn saxpy_of(context: &Arc<CudaContext>) -> (Arc<CudaModule>, CudaFunction) {
    let module = context.load_module(Ptx::from_src(kernels("sm_90a", "vector"))).expect("a module");
    let function = module.load_function("saxpy").expect("a function");
    (module, function)
}

/// `y = a x + y` over all of `y`.
fn saxpy(
    stream: &Arc<CudaStream>,
    function: &CudaFunction,
    a: f32,
    x: &CudaSlice<f32>,
    y: &mut CudaSlice<f32>,
    n: i32,
) -> Result<(), cudarc::driver::DriverError> {
    let shape = LaunchConfig {
        grid_dim: (n.cast_unsigned().div_ceil(128), 1, 1),
        block_dim: (128, 1, 1),
        shared_mem_bytes: 0,
    };
    let mut launch = stream.launch_builder(function);
    launch.arg(&a).arg(x).arg(y).arg(&n);
    // SAFETY: the parameters are those of the kernel; its bounds are checked by the interpreter.
    unsafe { launch.launch(shape) }.map(|_| ())
}

fn code<T>(result: Result<T, cudarc::driver::DriverError>) -> CUresult {
    match result {
        Ok(_) => CUresult::CUDA_SUCCESS,
        Err(error) => error.0,
    }
}

#[test]
fn a_graph_is_captured_and_replayed_with_changed_input() {
    in_child("a_graph_is_captured_and_replayed_with_changed_input", &[], || {
        let (context, stream) = device();
        assert_eq!(CudaContext::device_count().expect("a count"), 1);
        assert_eq!(context.name().expect("a name"), "PTX interpreter (no GPU), sm_90");
        assert_eq!(context.compute_capability().expect("a capability"), (9, 0));
        let (_module, function) = saxpy_of(&context);
        let n = 1000;
        let mut x = stream.clone_htod(&vec![1f32; n]).expect("a copy");
        let mut y = stream.clone_htod(&vec![10f32; n]).expect("a copy");
        saxpy(&stream, &function, 2.0, &x, &mut y, n as i32).expect("a launch");
        assert_eq!(stream.clone_dtoh(&y).expect("a copy"), vec![12f32; n]);

        stream
            .begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
            .expect("a capture");
        saxpy(&stream, &function, 0.5, &x, &mut y, n as i32).expect("a launch");
        assert_eq!(code(stream.synchronize()), CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
        let graph =
            stream.end_capture(sys::CUgraphInstantiate_flags(0)).expect("a graph").expect("work in it");
        // Captured work is not done.
        assert_eq!(stream.clone_dtoh(&y).expect("a copy"), vec![12f32; n]);
        graph.upload().expect("an upload");
        graph.launch().expect("a replay");
        assert_eq!(stream.clone_dtoh(&y).expect("a copy"), vec![12.5f32; n]);
        stream.memcpy_htod(&vec![3f32; n], &mut x).expect("a copy");
        graph.launch().expect("a replay");
        assert_eq!(stream.clone_dtoh(&y).expect("a copy"), vec![14f32; n]);
    });
}

#[test]
fn pinned_memory_events_and_streams_that_wait() {
    in_child("pinned_memory_events_and_streams_that_wait", &[], || {
        let (context, stream) = device();
        let (_module, function) = saxpy_of(&context);
        let n = 256;
        // SAFETY: written before it is read, right below.
        let mut pinned = unsafe { context.alloc_pinned_with_flags::<f32>(n, 0) }.expect("pinned memory");
        pinned.as_mut_slice().expect("the host's").fill(4.0);
        let mut x = stream.alloc_zeros::<f32>(n).expect("memory");
        stream.memcpy_htod(&pinned, &mut x).expect("a copy");
        let mut y = stream.alloc_zeros::<f32>(n).expect("memory");
        // A second stream joins the capture of the first.
        stream
            .begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
            .expect("a capture");
        let other = context.new_stream().expect("a stream");
        other.join(&stream).expect("a wait");
        saxpy(&other, &function, 1.0, &x, &mut y, n as i32).expect("a launch");
        stream.join(&other).expect("a wait");
        let graph =
            stream.end_capture(sys::CUgraphInstantiate_flags(0)).expect("a graph").expect("work in it");
        graph.launch().expect("a replay");
        assert_eq!(stream.clone_dtoh(&y).expect("a copy"), vec![4f32; n]);
        let flags = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
        let (start, end) =
            (stream.record_event(flags).expect("an event"), stream.record_event(flags).expect("an event"));
        assert_eq!(start.elapsed_ms(&end).expect("a time"), 0.0);
        // Work of outside may not be waited for inside.
        let outside = other.record_event(None).expect("an event");
        stream
            .begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
            .expect("a capture");
        assert_eq!(code(stream.wait(&outside)), CUresult::CUDA_ERROR_STREAM_CAPTURE_ISOLATION);
    });
}

#[test]
fn no_device() {
    in_child("no_device", &[(attar_fake_cuda::DEVICES, "0")], || {
        assert_eq!(code(CudaContext::new(0)), CUresult::CUDA_ERROR_NO_DEVICE);
    });
}

#[test]
fn several_devices() {
    in_child("several_devices", &[(attar_fake_cuda::DEVICES, "2")], || {
        assert_eq!(CudaContext::device_count().expect("a count"), 2);
        assert_eq!(code(CudaContext::new(2)), CUresult::CUDA_ERROR_INVALID_DEVICE);
        let contexts = [0, 1].map(|i| CudaContext::new(i).expect("a context"));
        for context in &contexts {
            let stream = context.default_stream();
            let x = stream.clone_htod(&[1u8, 2, 3]).expect("a copy");
            assert_eq!(stream.clone_dtoh(&x).expect("a copy"), [1, 2, 3]);
        }
        assert_ne!(contexts[0].uuid().expect("an id").bytes, contexts[1].uuid().expect("an id").bytes);
    });
}

#[test]
fn out_of_memory() {
    in_child("out_of_memory", &[(attar_fake_cuda::MEMORY, "1000000")], || {
        let (context, stream) = device();
        assert_eq!(context.mem_get_info().expect("bytes"), (1_000_000, 1_000_000));
        let first = stream.alloc_zeros::<u8>(900_000).expect("memory");
        assert_eq!(code(stream.alloc_zeros::<u8>(200_000)), CUresult::CUDA_ERROR_OUT_OF_MEMORY);
        drop(first);
        stream.alloc_zeros::<u8>(200_000).expect("memory that was given back");
    });
}

#[test]
fn images_of_other_architectures() {
    let older = [(attar_fake_cuda::CAPABILITY, "8.6")];
    in_child("images_of_other_architectures", &older, || {
        let (context, _stream) = device();
        assert_eq!(context.compute_capability().expect("a capability"), (8, 6));
        let newer = context.load_module(Ptx::from_src(kernels("sm_90a", "mma")));
        assert_eq!(code(newer), CUresult::CUDA_ERROR_INVALID_PTX);
        context.load_module(Ptx::from_src(kernels("sm_80", "mma"))).expect("a module");
        let cubin = |architecture| {
            let image = attar_fake_cuda::fake_cubin(architecture, &kernels("sm_80", "mma"));
            code(context.load_module(Ptx::from_binary(image)))
        };
        assert_eq!(cubin("sm_80"), CUresult::CUDA_SUCCESS);
        for other in ["sm_75", "sm_89", "sm_90a"] {
            assert_eq!(cubin(other), CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU, "{other}");
        }
        // Machine code as it comes from NVRTC.
        let elf = [b"\x7fELF\x02\x01\x01\x00".to_vec(), vec![0; 64]].concat();
        assert_eq!(code(context.load_module(Ptx::from_binary(elf))), CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU);
        assert_eq!(code(context.load_module(Ptx::from_src("nonsense"))), CUresult::CUDA_ERROR_INVALID_PTX);
    });
}

#[test]
fn a_driver_too_old_for_the_ptx() {
    in_child("a_driver_too_old_for_the_ptx", &[(attar_fake_cuda::DRIVER, "12080")], || {
        let (context, _stream) = device();
        let module = context.load_module(Ptx::from_src(kernels("sm_90a", "vector")));
        assert_eq!(code(module), CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION);
        let older = kernels("sm_90a", "vector").replace(".version 9.0", ".version 8.7");
        context.load_module(Ptx::from_src(older)).expect("a module");
    });
}

#[test]
fn an_interrupted_upload() {
    in_child("an_interrupted_upload", &[(attar_fake_cuda::FAIL_COPY, "2")], || {
        let (_context, stream) = device();
        stream.clone_htod(&[1u8; 64]).expect("the first copy");
        assert_eq!(code(stream.clone_htod(&[1u8; 64])), CUresult::CUDA_ERROR_UNKNOWN);
        stream.clone_htod(&[1u8; 64]).expect("the third copy");
    });
}

#[test]
fn a_lost_device() {
    in_child("a_lost_device", &[(attar_fake_cuda::LOSE_AFTER, "2")], || {
        let (context, stream) = device();
        let (_module, function) = saxpy_of(&context);
        let x = stream.alloc_zeros::<f32>(128).expect("memory");
        let mut y = stream.alloc_zeros::<f32>(128).expect("memory");
        saxpy(&stream, &function, 1.0, &x, &mut y, 128).expect("the first launch");
        stream.synchronize().expect("its end");
        saxpy(&stream, &function, 1.0, &x, &mut y, 128).expect("the second launch");
        assert_eq!(code(stream.synchronize()), CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE);
        let third = saxpy(&stream, &function, 1.0, &x, &mut y, 128);
        assert_eq!(code(third), CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE);
        assert_eq!(code(stream.clone_dtoh(&x)), CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE);
    });
}

#[test]
fn faults_of_kernels_stay() {
    in_child("faults_of_kernels_stay", &[], || {
        let (context, stream) = device();
        let (module, function) = saxpy_of(&context);
        assert_eq!(code(module.load_function("missing")), CUresult::CUDA_ERROR_NOT_FOUND);
        let x = stream.alloc_zeros::<f32>(128).expect("memory");
        let mut y = stream.alloc_zeros::<f32>(100).expect("memory");
        // More threads than a block has.
        let shape = LaunchConfig { grid_dim: (1, 1, 1), block_dim: (2048, 1, 1), shared_mem_bytes: 0 };
        let mut launch = stream.launch_builder(&function);
        launch.arg(&1f32).arg(&x).arg(&mut y).arg(&100i32);
        // SAFETY: it is refused.
        assert_eq!(code(unsafe { launch.launch(shape) }), CUresult::CUDA_ERROR_INVALID_VALUE);
        saxpy(&stream, &function, 1.0, &x, &mut y, 100).expect("a launch");
        stream.synchronize().expect("its end");
        // Past the end of `y`: the launch is made, and what follows tells.
        saxpy(&stream, &function, 1.0, &x, &mut y, 101).expect("a launch");
        assert_eq!(code(stream.synchronize()), CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
        assert_eq!(code(stream.alloc_zeros::<f32>(1)), CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
    });
}

#[test]
fn shared_memory_above_the_default() {
    in_child("shared_memory_above_the_default", &[], || {
        let (context, stream) = device();
        let module = context.load_module(Ptx::from_src(kernels("sm_90a", "vector"))).expect("a module");
        let function = module.load_function("block_sum").expect("a function");
        let x = stream.clone_htod(&vec![1f32; 512]).expect("a copy");
        let mut out = stream.alloc_zeros::<f32>(2).expect("memory");
        let mut run = |bytes| {
            let shape = LaunchConfig { grid_dim: (2, 1, 1), block_dim: (256, 1, 1), shared_mem_bytes: bytes };
            let mut launch = stream.launch_builder(&function);
            launch.arg(&x).arg(&mut out).arg(&512i32);
            // SAFETY: the parameters are those of the kernel.
            code(unsafe { launch.launch(shape) })
        };
        assert_eq!(run(1024), CUresult::CUDA_SUCCESS);
        assert_eq!(run(100_000), CUresult::CUDA_ERROR_INVALID_VALUE);
        let attribute = CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        function.set_attribute(attribute, 100_000).expect("an attribute");
        assert_eq!(run(100_000), CUresult::CUDA_SUCCESS);
        assert_eq!(stream.clone_dtoh(&out).expect("a copy"), [256.0; 2]);
        assert_eq!(code(function.set_attribute(attribute, 300_000)), CUresult::CUDA_ERROR_INVALID_VALUE);
    });
}

#[test]
fn a_setting_that_is_wrong() {
    in_child("a_setting_that_is_wrong", &[(attar_fake_cuda::MODE, "sometimes")], || {
        assert_eq!(code(CudaContext::new(0)), CUresult::CUDA_ERROR_UNKNOWN);
    });
}

#[test]
fn launches_are_logged() {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fake-cuda-launches");
    let name = path.to_str().expect("text");
    let mine = std::env::var(CHILD).is_err();
    if mine {
        let _ = std::fs::remove_file(&path);
    }
    in_child(
        "launches_are_logged",
        &[(attar_fake_cuda::LOG, name), (attar_fake_cuda::MODE, "eager")],
        || {
            let (context, stream) = device();
            let (_module, function) = saxpy_of(&context);
            let x = stream.alloc_zeros::<f32>(128).expect("memory");
            let mut y = stream.alloc_zeros::<f32>(128).expect("memory");
            saxpy(&stream, &function, 1.0, &x, &mut y, 128).expect("a launch");
        },
    );
    if mine {
        let log = std::fs::read_to_string(&path).expect("a log");
        let fields: Vec<&str> = log.trim().split('\t').collect();
        assert_eq!((fields[0], fields[1], fields[4], fields[5]), ("saxpy", "[1, 1, 1]", "1024", "512"));
    }
}

#[test]
fn tensor_maps() {
    in_child("tensor_maps", &[], || {
        let (_context, stream) = device();
        let x = stream.alloc_zeros::<u16>(64 * 64).expect("memory");
        let (address, _sync) = cudarc::driver::DevicePtr::device_ptr(&x, &stream);
        let encode = |stride: u64, box_columns: u32| {
            let mut map = sys::CUtensorMap { opaque: [0; 16] };
            // SAFETY: the lists have as many numbers as the tensor has dimensions.
            let code = unsafe {
                sys::cuTensorMapEncodeTiled(
                    &mut map,
                    sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                    2,
                    address as *mut std::ffi::c_void,
                    [64, 64].as_ptr(),
                    [stride].as_ptr(),
                    [box_columns, 64].as_ptr(),
                    [1, 1].as_ptr(),
                    sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                    sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                    sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_NONE,
                    sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
                )
            };
            (code, map.opaque)
        };
        let (code, opaque) = encode(128, 64);
        assert_eq!(code, CUresult::CUDA_SUCCESS);
        assert_ne!(opaque, [0; 16]);
        assert_eq!(encode(100, 64).0, CUresult::CUDA_ERROR_INVALID_VALUE);
        assert_eq!(encode(128, 128).0, CUresult::CUDA_ERROR_INVALID_VALUE);
    });
}
