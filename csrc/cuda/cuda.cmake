# nvcc compiles the kernels by hand-written rules: CMake's own CUDA language wants a whole toolkit,
# and NVIDIA's wheels on PyPI are not laid out as one.
#
#   QLK_NVCC                nvcc, with its headers and libraries beside it
#   QLK_CUDA_ARCHITECTURES  a list of 75, 80, 86, 89, 90, 100, 120. PTX of 80 comes along, for what is
#                           newer; 75 (Turing) gets the simple kernels only, and their PTX of 75
set(QLK_NVCC "" CACHE FILEPATH "The CUDA compiler")
set(QLK_CUDA_ARCHITECTURES 75 80 86 89 90 100 120 CACHE STRING "Compute capabilities to build for")
if(NOT EXISTS "${QLK_NVCC}")
  message(FATAL_ERROR "QLK_CUDA needs QLK_NVCC, the path of nvcc; QLK_NVCC=${QLK_NVCC} does not exist")
endif()

set(QLK_CUDA_KERNELS
  gemm_linear gemm_linear_f16 gemm_input_grad gemm_input_grad_f16 gemm_lora
  decode_linear_mma decode_input_grad_mma decode_lora_mma
  decode_linear_simt decode_any decode_lora decode_launch quantize dequantize adamw)
# Those that run on Turing too.
set(QLK_CUDA_TURING quantize dequantize adamw decode_linear_simt decode_any decode_lora decode_launch)

file(REAL_PATH "${QLK_NVCC}" nvcc_file)
get_filename_component(nvcc_root "${nvcc_file}" DIRECTORY)
get_filename_component(nvcc_root "${nvcc_root}" DIRECTORY)
find_file(QLK_CUDART_STATIC libcudart_static.a NO_CACHE REQUIRED NO_DEFAULT_PATH
          PATHS ${nvcc_root}/lib64 ${nvcc_root}/lib ${nvcc_root}/targets/x86_64-linux/lib)
find_path(QLK_CUDA_INCLUDE cuda_runtime_api.h NO_CACHE REQUIRED NO_DEFAULT_PATH
          PATHS ${nvcc_root}/include ${nvcc_root}/targets/x86_64-linux/include)

# -gencode options of one source. All code from sm_80 on is made of compute_80's PTX, which comes
# along for what is newer: what the emulator runs is what ships on every architecture, although
# CUDA's own headers have other code for some; and the compiler's first half runs once.
function(qlk_gencode kernel out)
  set(flags "")
  set(code ${QLK_CUDA_ARCHITECTURES})
  list(REMOVE_ITEM code 75)
  list(TRANSFORM code PREPEND sm_)
  if(75 IN_LIST QLK_CUDA_ARCHITECTURES AND kernel IN_LIST QLK_CUDA_TURING)
    list(APPEND flags -gencode "arch=compute_75,code=[sm_75,compute_75]")
  endif()
  # Tensor-core kernels are in a build for Turing alone too, which never launches them: as PTX, so
  # that their launchers link and nvcc does not take an architecture of its own choice.
  if(code OR NOT kernel IN_LIST QLK_CUDA_TURING)
    list(APPEND code compute_80)
    list(JOIN code "," code)
    list(APPEND flags -gencode "arch=compute_80,code=[${code}]")
  endif()
  set(${out} ${flags} PARENT_SCOPE)
endfunction()

set(QLK_CUDA_OBJECTS "")
foreach(kernel ${QLK_CUDA_KERNELS})
  set(source ${CMAKE_SOURCE_DIR}/csrc/cuda/${kernel}.cu)
  set(object ${CMAKE_BINARY_DIR}/cuda/${kernel}.o)
  qlk_gencode(${kernel} gencode)
  add_custom_command(
    OUTPUT ${object}
    COMMAND ${QLK_NVCC} -c -O3 -std=c++20 -lineinfo -ccbin ${CMAKE_CXX_COMPILER} ${gencode}
            -diag-suppress=177  # a constant that one specialisation of a template leaves unused
            -Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off $<$<BOOL:${QLK_WERROR}>:-Werror=all-warnings>
            -MD -MF ${object}.d -MT ${object} -o ${object} ${source}
    DEPENDS ${source}
    DEPFILE ${object}.d
    COMMENT "Compiling CUDA kernels ${kernel}.cu"
    VERBATIM COMMAND_EXPAND_LISTS)
  list(APPEND QLK_CUDA_OBJECTS ${object})
endforeach()
file(MAKE_DIRECTORY ${CMAKE_BINARY_DIR}/cuda)
add_custom_target(qlk_cuda_objects DEPENDS ${QLK_CUDA_OBJECTS})

function(qlk_cuda_library target)
  add_library(${target} MODULE EXCLUDE_FROM_ALL
    ${CMAKE_SOURCE_DIR}/csrc/torch_ops_cuda.cpp ${CMAKE_SOURCE_DIR}/csrc/torch_ops_cuda_adamw.cpp
    ${CMAKE_SOURCE_DIR}/csrc/cuda/paging.cpp ${CMAKE_SOURCE_DIR}/csrc/cuda/device.cpp
    ${CMAKE_SOURCE_DIR}/csrc/cuda/dispatch.cpp ${QLK_CUDA_OBJECTS})
  set_source_files_properties(${QLK_CUDA_OBJECTS} PROPERTIES EXTERNAL_OBJECT TRUE GENERATED TRUE)
  add_dependencies(${target} qlk_cuda_objects)
  qlk_shared_library(${target})
  target_include_directories(${target} SYSTEM PRIVATE ${QLK_CUDA_INCLUDE})
  target_include_directories(${target} PRIVATE ${CMAKE_SOURCE_DIR}/csrc)
  target_link_libraries(${target} PRIVATE qlk_torch)
endfunction()

# Loaded where torch has loaded its own CUDA half, whose name must stand in ours to be looked into;
# the torch that is built against may be one without it.
file(WRITE ${CMAKE_BINARY_DIR}/cuda/nothing.cpp "")
add_library(qlk_torch_cuda_name SHARED EXCLUDE_FROM_ALL ${CMAKE_BINARY_DIR}/cuda/nothing.cpp)
set_target_properties(qlk_torch_cuda_name PROPERTIES
  OUTPUT_NAME torch_cuda LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/cuda)
qlk_cuda_library(_ops_cuda)
set_target_properties(_ops_cuda PROPERTIES SUFFIX ".abi3.so")
target_link_libraries(_ops_cuda PRIVATE
  -Wl,--push-state,--no-as-needed qlk_torch_cuda_name -Wl,--pop-state
  ${QLK_CUDART_STATIC} rt pthread dl)

# The runtime's stand-in has the same soname as the real one, and is loaded first.
qlk_cuda_library(_ops_cuda_emulated)
set_target_properties(_ops_cuda_emulated PROPERTIES SUFFIX ".so")
target_compile_definitions(_ops_cuda_emulated PRIVATE QLK_CUDA_EMULATED)
target_link_libraries(_ops_cuda_emulated PRIVATE _cudart_stub)
