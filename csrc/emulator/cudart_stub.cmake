# _cudart_stub and _cudart_stub12: the stand-ins for the runtimes of CUDA 13 and 12. The files' names
# are ours, their sonames are the runtimes': that is how a library linked with `-cudart shared` finds
# its own already loaded.
function(emu_cudart_stub target major)
  string(REGEX REPLACE "^_" "" map_name ${target})
  set(map ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/${map_name}.map)
  add_library(${target} SHARED ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/cudart_stub.cc)
  if(COMMAND qlk_shared_library)
    qlk_shared_library(${target})
  endif()
  set_target_properties(${target} PROPERTIES PREFIX "" NO_SONAME ON LINK_DEPENDS ${map})
  target_compile_definitions(${target} PRIVATE CUDART_MAJOR=${major})
  target_link_options(${target} PRIVATE LINKER:-soname,libcudart.so.${major}
                                        LINKER:--version-script=${map})
endfunction()
emu_cudart_stub(_cudart_stub 13)
emu_cudart_stub(_cudart_stub12 12)
